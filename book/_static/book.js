// What the theme's pages lack for people who do not look or point: names of controls that agree with their visible words.
document.addEventListener("DOMContentLoaded", () => {
  const misnamed = "summary[aria-label], button.search-button__button, button.theme-switch-button";
  document.querySelectorAll(misnamed).forEach((control) => control.removeAttribute("aria-label"));
  document.querySelectorAll(".citation-list").forEach((list) => list.removeAttribute("role")); // it holds no list items
});
