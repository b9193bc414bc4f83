"""The rendered site in a real browser, Debian's Chromium, with the network cut: what a reader sees and can operate.

Without a Chromium these tests are skipped, loudly; in CI that is a failure. axe-core is what `npm ci` puts into
tests/book/node_modules (see .ci/run).
"""

import io
import os
import shutil
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740}}
READY = "() => !window.MathJax || !window.MathJax.startup || window.MathJax.startup.promise.then(() => true)"
FIGURES = "main figure img, main .cell_output img"


def lacking(what):
    """Fail in CI, where everything is installed; skip with a warning on a machine that lacks it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed, and CI needs it: see .ci/run")
    warnings.warn(f"NO BROWSER TEST WAS RUN: {what} is not installed (see .ci/run)", stacklevel=2)
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (path := next(filter(None, map(shutil.which, names)), None)):
        lacking("Chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def folder(site):
    return site.output / "html"


@pytest.fixture(scope="module")
def pages(folder):
    found = [path for path in folder.rglob("*.html") if "_static" not in path.parts]
    assert len(found) > 8
    return sorted(path for path in found if path != folder / "index.html")  # which only leads to book/index.html


@pytest.fixture(scope="module")
def server(folder):
    """Address of the site, served from this machine: the search page reads other pages, which files may not."""
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=folder)) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.fixture
def visit(browser, folder, server):
    """Open a file of the site in a fresh window: (page, what went wrong). A request to anywhere but the site fails."""
    windows = []

    def open_page(path, query="", size="desktop", mode="light"):
        window = browser.new_context(viewport=SIZES[size], color_scheme=mode, has_touch=size == "phone")
        window.set_default_timeout(300_000)  # 30 s, the browser's own limit, passes on a busy machine
        windows.append(window)
        page, wrong = window.new_page(), []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url}"))
        page.route(lambda address: not address.startswith((server, "data:", "blob:")), lambda route: route.abort())
        page.goto(f"{server}/{path.relative_to(folder)}{query}", wait_until="load")
        page.evaluate(READY)
        return page, wrong

    yield open_page
    for window in windows:
        window.close()


def failing(pages, check):
    """Pages that a check (page path -> what is wrong, or nothing) finds fault with."""
    return {path.name: wrong for path in pages if (wrong := check(path))}


def grey(page, locator):
    """Lightness (0 to 255) of the pixels of a screenshot of the first element."""
    locator.scroll_into_view_if_needed()
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("L"))


def test_every_page_loads_without_a_network_and_without_an_error(pages, visit):
    assert not failing(pages, lambda path: visit(path)[1])


def test_a_remote_request_or_an_error_would_be_seen(folder, visit):
    page, wrong = visit(folder / "book/primer.html")
    page.set_content('<img src="https://example.invalid/x.png"><script>console.error("oh"); throw Error("no")</script>')
    assert [any(what in line for line in wrong) for what in ("example.invalid", "oh", "no")] == [True] * 3


def test_mathematics_is_typeset(pages, visit):
    def check(path):
        page, _ = visit(path)
        wanted, made = (page.locator(f"main {what}").count() for what in (".math", "mjx-container"))
        left = page.locator("mjx-merror").count() + page.locator("main").inner_text().count("\\(")
        return (wanted, made, left) if made < wanted or left else None

    assert not failing(pages, check)
    assert visit(next(path for path in pages if path.name == "notation.html"))[0].locator("mjx-container").count() > 10


def test_no_table_breaks_a_number_or_a_part_of_a_claims_id(pages, visit):
    broken = """cells => cells.flatMap(cell => [...cell.childNodes]).filter(node => {
        const text = document.createRange();
        text.selectNodeContents(node);
        return node.nodeType === Node.TEXT_NODE && text.getClientRects().length > 1;
    }).map(node => node.textContent)"""

    def check(path):
        page, _ = visit(path)
        numbers = page.locator(".cell_output table:not(.comparison, :has(tr > :nth-child(9))) td.whole")
        ids = page.locator("table.comparison td:first-child")
        assert ("notebooks" in str(path)) == (numbers.count() > 5 and ids.count() > 2)
        return numbers.evaluate_all(broken) + ids.evaluate_all(broken)

    assert not failing(pages, check)


def test_sliders_move_with_the_arrow_keys_and_change_the_picture(pages, visit):
    def check(path):
        page, _ = visit(path)
        wrong = []
        for slider in page.locator("main input[type=range]").all():
            figure = slider.locator("xpath=ancestor::figure[1]")
            slider.focus()
            before = grey(page, figure.locator("img:visible")), figure.inner_text()
            page.keyboard.press("End")
            after = grey(page, figure.locator("img:visible")), figure.inner_text()
            page.keyboard.press("Home")
            again = grey(page, figure.locator("img:visible")), figure.inner_text()
            if np.array_equal(before[0], after[0]) and np.array_equal(after[0], again[0]) or after[1] == again[1]:
                wrong.append(slider.get_attribute("aria-label"))
        return wrong

    assert not failing(pages, check)


def test_a_slider_moves_under_a_finger(folder, visit):
    page, _ = visit(folder / "notebooks/02_mixed_batch_adversarial_training.html", size="phone")
    slider = page.locator("main input[type=range]").first
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    frames = page.locator("main .eps-slider").first.locator("img")
    assert frames.last.is_visible() and not frames.first.is_visible()


def test_print_shows_the_strongest_attack_and_no_slider(folder, visit):
    page, _ = visit(folder / "notebooks/02_mixed_batch_adversarial_training.html")
    figure = page.locator("main .eps-slider").first
    frames, slider = figure.locator("img"), figure.locator("input")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # the browser's own, before it lays out the paper
    assert frames.last.is_visible() and figure.locator("img:visible").count() == 1 and not slider.is_visible()
    assert figure.locator("output").inner_text() == frames.last.get_attribute("alt")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert slider.input_value() == "1" and frames.nth(1).is_visible() and not frames.last.is_visible()


def test_every_chapter_has_a_slider(site, folder, visit):
    without = [name for name in site.chapters() if site.shown(name) and not visit(folder / f"notebooks/{name}.html")[0]
               .locator("main input[type=range]").count()]
    assert not without


def test_search_finds_gradient_masking(folder, visit):
    page, wrong = visit(folder / "search.html", "?q=gradient+masking")
    page.wait_for_selector("#search-results li a")
    assert "primer" in page.locator("#search-results").inner_html() and not wrong


def test_the_ledger_can_be_searched_filtered_and_sorted(folder, visit):
    page, wrong = visit(folder / "book/ledger.html")
    rows = page.locator("table.ledger tbody tr:visible")
    everything = rows.count()
    page.locator("select[name=paper]").select_option("02")
    assert 0 < rows.count() < everything and all("02." in text for text in rows.locator("code").all_inner_texts())
    page.locator("input[name=words]").fill("mixed-batch loss")
    assert 0 < rows.count() < 6
    assert page.locator(".ledger-tools output").inner_text() == f"{rows.count()} of {everything} rows"
    page.locator("select[name=verdict]").select_option("not-testable")
    page.locator("input[name=words]").fill("no such words")
    assert rows.count() == 0
    page.locator(".ledger-tools").evaluate("form => { form.reset(); form.dispatchEvent(new Event('input')); }")
    assert rows.count() == everything
    page.get_by_role("button", name="Verdict").click()
    verdicts = page.locator("table.ledger tbody tr td:nth-child(4)").all_inner_texts()
    assert verdicts == sorted(verdicts) and not wrong
    page.get_by_role("button", name="Verdict").click()
    assert page.locator("table.ledger tbody tr td:nth-child(4)").all_inner_texts()[0] == verdicts[-1]
    page.get_by_role("button", name="Paper").click()  # its numbers by their size: 0.00135, 0.9895, 0.99, 15.8
    papers = page.locator("table.ledger tbody tr td:nth-child(2)").all_inner_texts()
    numbers = [float(text) for text in papers if text != "–"]
    assert len(numbers) > 9 and numbers == sorted(numbers) and set(papers[len(numbers):]) == {"–"}


def test_figures_are_legible_on_a_dark_page(pages, visit):
    def check(path):
        page, _ = visit(path, mode="dark")
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        wrong = [] if sum(map(int, body[4:-1].split(","))) < 200 else [f"the page itself is {body}"]
        for picture in page.locator(FIGURES).all():
            if picture.is_visible():
                dark, light = np.percentile(grey(page, picture), [0.5, 99.5])
                wrong += [] if light - dark > 100 else [picture.get_attribute("alt")]
        return wrong

    assert not failing(pages, check)


def test_a_phone_needs_no_sideways_scroll(pages, visit):
    def check(path):
        page, _ = visit(path, size="phone")
        wide = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
        return wide if wide > 0 else None

    assert not failing(pages, check)


@pytest.mark.parametrize(("mode", "rules"), [("light", ""), ("dark", "runOnly: ['cat.color']")])  # all else is the same
def test_axe_finds_no_serious_violation(pages, visit, mode, rules):
    if not AXE.exists():
        lacking("axe-core")

    def check(path):
        page, _ = visit(path, mode=mode)
        page.add_style_tag(content="* { transition: none !important; }")  # or a colour is caught on its way
        page.add_script_tag(path=AXE)
        found = page.evaluate(f"axe.run(document, {{resultTypes: ['violations'], {rules}}})")["violations"]
        return [f"{v['id']}: {v['nodes'][0]['html'][:150]} ({len(v['nodes'])})" for v in found
                if v["impact"] in ("serious", "critical")]

    assert not failing(pages, check)
