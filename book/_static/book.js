document.addEventListener("DOMContentLoaded", () => {
  // Names of controls agree with their visible words, or they cannot be operated by voice.
  const misnamed = "summary[aria-label], button.search-button__button, button.theme-switch-button";
  document.querySelectorAll(misnamed).forEach((control) => control.removeAttribute("aria-label"));
  document.querySelectorAll(".citation-list").forEach((list) => list.removeAttribute("role")); // it holds no list items
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  document.querySelectorAll("table.ledger").forEach(makeLedger);
  document.querySelectorAll(".cell_output table").forEach(classify);
  document.querySelectorAll(".eps-slider input").forEach(printLast);
  document.querySelectorAll(".tag_output_scroll .cell_output").forEach((part) => (part.tabIndex = 0)); // for arrow keys
});

// Numbers and short names of rows stay in one line. The paper and ours: ids may break after a part.
function classify(table) {
  table.querySelectorAll("tbody :is(td, th)").forEach((cell) => {
    const text = cell.textContent.trim();
    const short = cell.tagName === "TH" && text.length < 16;
    cell.classList.toggle("whole", short || /^[-+−]?\d[-+−\d\s.e±%]*$/.test(text));
  });
  if (!table.tHead?.textContent.includes("Verdict")) return;
  table.classList.add("comparison");
  table.querySelectorAll("td:first-child:not(:empty)").forEach((cell) => {
    const parts = cell.textContent.split(/(?<=[._])/);
    cell.replaceChildren(...parts.flatMap((part) => [part, document.createElement("wbr")]));
  });
}

// Paper shows a slider's last picture, the strongest attack: the first is the image before any.
function printLast(slider) {
  const move = (value) => {
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
  };
  let shown = slider.value;
  addEventListener("beforeprint", () => {
    shown = slider.value;
    move(slider.max);
  });
  addEventListener("afterprint", () => move(shown));
}

// The ledger can be searched and filtered; without this script it is a plain table.
function makeLedger(table) {
  const tools = document.querySelector("form.ledger-tools");
  const rows = [...table.tBodies[0].rows];
  const show = () => {
    const { words, paper, verdict } = Object.fromEntries(new FormData(tools));
    const wanted = words.toLowerCase().split(/\s+/);
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !(wanted.every((word) => text.includes(word)) && row.dataset.paper.startsWith(paper) &&
        (!verdict || row.dataset.verdict === verdict));
    });
    tools.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  tools.addEventListener("input", show);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.hidden = false;
  show();
}

// A press on a column's head sorts: numbers by their size, then words.
function makeSortable(table) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  table.querySelectorAll("th").forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.onclick = () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      table.querySelectorAll("th").forEach((other) => (other.ariaSort = null));
      head.ariaSort = sign > 0 ? "ascending" : "descending";
      const text = (row) => row.cells[column].textContent;
      const number = (row) => (isNaN(parseFloat(text(row))) ? Infinity : parseFloat(text(row))); // words come last
      rows.sort((a, b) => sign * (number(a) - number(b) || text(a).localeCompare(text(b), "en")));
      body.append(...rows);
    };
  });
}
