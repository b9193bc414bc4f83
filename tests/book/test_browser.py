"""The rendered site in a real browser, Debian's Chromium, with the network cut: what a reader sees and can operate.

Without a Chromium these tests are skipped, loudly; in CI that is a failure. axe-core is what `npm ci` puts into
tests/book/node_modules (see .ci/run).
"""

import io
import json
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import lacking
from filelock import FileLock
from PIL import Image

AXE = Path(__file__).parent / "node_modules/axe-core/axe.min.js"
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 360, "height": 740},
         "wide": {"width": 1300, "height": 900}}
TALLEST = 25_000  # pixels of a chapter in the wide window; our pages leave 3 % for other fonts
READY = "() => !window.MathJax || !window.MathJax.startup || window.MathJax.startup.promise.then(() => true)"
FIGURES = "main figure img, main .cell_output img"


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


@contextmanager
def opened(browser, server, address, size="desktop", mode="light"):
    """Open an address of the site in a fresh window: (page, what went wrong). A request to elsewhere fails."""
    window = browser.new_context(viewport=SIZES[size], color_scheme=mode, has_touch=size == "phone")
    window.set_default_timeout(300_000)  # 30 s, the browser's own limit, passes on a busy machine
    page, wrong = window.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url}"))
    page.route(lambda address: not address.startswith((server, "data:", "blob:")), lambda route: route.abort())
    page.goto(f"{server}/{address}", wait_until="load")
    page.evaluate(READY)
    try:
        yield page, wrong
    finally:
        window.close()


@pytest.fixture
def visit(browser, folder, server):
    """Open a file of the site for this test: (page, what went wrong)."""
    with ExitStack() as windows:
        yield lambda path, query="", **look: windows.enter_context(
            opened(browser, server, f"{path.relative_to(folder)}{query}", **look))


@pytest.fixture
def faults(shared, pages, browser, folder, server):
    """What the checks of a look find on every page, name -> page -> fault.

    A page is opened once in each look, by the first process of pytest that asks, and the others read what it found.
    """
    def of(look):
        path, (options, checks) = shared / f"faults-{look}.json", LOOKS[look]
        with FileLock(f"{path}.lock"):
            if not path.exists():
                found = {check.__name__: {} for check in checks}
                for place in pages:
                    with opened(browser, server, place.relative_to(folder), **options) as (page, wrong):
                        for check in checks:
                            if fault := check(page, place, wrong):
                                found[check.__name__][place.name] = fault
                path.write_text(json.dumps(found), encoding="utf-8")
            return json.loads(path.read_text(encoding="utf-8"))

    return of


def grey(page, locator):
    """Lightness (0 to 255) of the pixels of a screenshot of the first element."""
    locator.scroll_into_view_if_needed()
    return np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("L"))


# ── What every page is looked through for, once in each look ──


def loads_without_a_network_and_without_an_error(page, place, wrong):
    return wrong


def mathematics_is_typeset(page, place, wrong):
    wanted, made = (page.locator(f"main {what}").count() for what in (".math", "mjx-container"))
    left = page.locator("mjx-merror").count() + page.locator("main").inner_text().count("\\(")
    few = place.name == "notation.html" and made <= 10
    return [wanted, made, left] if made < wanted or left or few else None


def no_table_breaks_a_number_or_a_part_of_a_claims_id(page, place, wrong):
    broken = """cells => cells.flatMap(cell => [...cell.childNodes]).filter(node => {
        const text = document.createRange();
        text.selectNodeContents(node);
        return node.nodeType === Node.TEXT_NODE && text.getClientRects().length > 1;
    }).map(node => node.textContent)"""
    papers = "notebooks" in str(place) and place.stem != "06_arena"  # which answers no paper's claims
    numbers = page.locator(".cell_output table:not(.comparison, :has(tr > :nth-child(9))) td.whole")
    ids = page.locator("table.comparison td:first-child")
    if papers != (numbers.count() > 5 and ids.count() > 2):
        return [f"{numbers.count()} numbers and {ids.count()} ids were looked at"]
    return numbers.evaluate_all(broken) + ids.evaluate_all(broken)


def sliders_move_with_the_arrow_keys_and_change_the_picture(page, place, wrong):
    found, sliders = [], page.locator("main .eps-slider input[type=range]").all()
    for slider in sliders:
        figure = slider.locator("xpath=ancestor::figure[1]")
        slider.focus()
        before = grey(page, figure.locator("img:visible")), figure.inner_text()
        page.keyboard.press("End")
        after = grey(page, figure.locator("img:visible")), figure.inner_text()
        page.keyboard.press("Home")
        again = grey(page, figure.locator("img:visible")), figure.inner_text()
        if np.array_equal(before[0], after[0]) and np.array_equal(after[0], again[0]) or after[1] == again[1]:
            found.append(slider.get_attribute("aria-label"))
    ran = "notebooks" in str(place) and not page.get_by_text("Not run yet.").count()
    return found if sliders or not ran else ["a chapter without a slider"]


def figures_are_legible_on_a_dark_page(page, place, wrong):
    body = page.evaluate("getComputedStyle(document.body).backgroundColor")
    found = [] if sum(map(int, body[4:-1].split(","))) < 200 else [f"the page itself is {body}"]
    for picture in page.locator(FIGURES).all():
        if picture.is_visible():
            dark, light = np.percentile(grey(page, picture), [0.5, 99.5])
            found += [] if light - dark > 100 else [picture.get_attribute("alt")]
    return found


def a_phone_needs_no_sideways_scroll(page, place, wrong):
    wide = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
    return wide if wide > 0 else None


def serious(page, rules="", part="document"):
    """What axe-core finds in a part of the page that is more than minor."""
    page.add_style_tag(content="* { transition: none !important; }")  # or a colour is caught on its way
    page.add_script_tag(path=AXE)
    found = page.evaluate(f"axe.run({part}, {{resultTypes: ['violations'], {rules}}})")["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:150]} ({len(v['nodes'])})" for v in found
            if v["impact"] in ("serious", "critical")]


def axe_finds_no_serious_violation(page, place, wrong):
    return serious(page)


def axe_finds_no_colours_too_close(page, place, wrong):  # all else is the same in the dark
    return serious(page, "runOnly: {type: 'rule', values: ['color-contrast', 'link-in-text-block']}")


LOOKS = {
    "light": ({}, [loads_without_a_network_and_without_an_error, mathematics_is_typeset,
                   no_table_breaks_a_number_or_a_part_of_a_claims_id,
                   sliders_move_with_the_arrow_keys_and_change_the_picture, axe_finds_no_serious_violation]),
    "dark": ({"mode": "dark"}, [figures_are_legible_on_a_dark_page, axe_finds_no_colours_too_close]),
    "phone": ({"size": "phone"}, [a_phone_needs_no_sideways_scroll]),
}


@pytest.mark.parametrize(("look", "check"), [(look, check.__name__) for look, (_, checks) in LOOKS.items()
                                             for check in checks])
def test_on_every_page(faults, look, check):
    if not AXE.exists():
        lacking("axe-core")
    assert not faults(look)[check]


# ── Single pages ──


def test_a_remote_request_or_an_error_would_be_seen(folder, visit):
    page, wrong = visit(folder / "book/primer.html")
    page.set_content('<img src="https://example.invalid/x.png"><script>console.error("oh"); throw Error("no")</script>')
    assert [any(what in line for line in wrong) for what in ("example.invalid", "oh", "no")] == [True] * 3


def test_chapters_end_as_long_as_their_folds_are_closed(site, folder, visit):
    """An older copy is shown as it ran, with the folds that it had and not those that its notebook has by now."""
    pages = [chapter for chapter in site.chapters() if site.committed(chapter)[0].exists()
             and not any("code has changed" in what for what in site.changed(*site.committed(chapter)))]
    if not pages:
        pytest.skip("no page of a chapter has today's code")
    tall = {}
    for chapter in pages:
        page, _ = visit(folder / f"notebooks/{chapter}.html", size="wide")
        assert page.locator("main details").count() > 9 and not page.locator("main details[open]").count()
        tall[chapter] = page.evaluate("document.documentElement.scrollHeight")
    assert max(tall.values()) <= TALLEST, tall


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


def test_tables_are_sorted_by_the_keyboard(folder, visit):
    page, wrong = visit(folder / "book/ledger.html")
    page.locator("table.ledger th button").nth(3).focus()
    for key, order in (("Enter", "ascending"), ("Space", "descending")):
        page.keyboard.press(key)
        verdicts = page.locator("table.ledger tbody tr td:nth-child(4)").all_inner_texts()
        assert verdicts == sorted(verdicts, reverse=order == "descending") and not wrong
        assert page.locator(f"table.ledger th[aria-sort={order}]").inner_text().startswith("Verdict")


def test_the_board_has_heads_that_sort(folder, visit):
    page, wrong = visit(folder / "book/board.html")
    rows = page.locator("table.board tbody tr")
    before = rows.count()
    page.get_by_role("button", name="Left").press("Enter")
    left = [float(text) for text in page.locator("table.board tbody tr td:nth-child(4)").all_inner_texts()]
    assert left == sorted(left) and rows.count() == before > 0 and not wrong


def told():
    """What the arena might have found of a defence, one image beaten and one flag raised; nothing is computed."""
    import pandas as pd  # with TensorFlow, which no other test of pages needs

    from helpers import arena, data, evaluation, flags
    from helpers.threat import ThreatModel

    d, (clean, worst) = data.load("digits"), np.array([[0, 0, 2], [0, 2, 2]])
    x, y, sure = d.x_test[:3], d.y_test[:3], np.full((3, 10), 0.1)
    found = evaluation.Found(np.clip(x + 0.1, 0, 1), worst - 1.0, np.full(3, 9))
    rows = [flags.share("images on a kink", clean == 2, 0.9, "<="), flags.flag(arena.NO_READOUT, 0.0, 1.0, ">=", 3)]
    attacks = pd.DataFrame([{"attack": "PGD", "path": "exact", "images": 3, "beaten": 1, "steps": 27}])
    report = evaluation.Report(clean, worst, found, attacks, pd.DataFrame(rows))
    curves = {"unaware": np.ones((2, 3), bool), "informed": np.array([[1, 1, 0], [1, 0, 0]], bool)}
    return arena.Entry("mine", d, ThreatModel("linf", 0.1), report, [0.0, 0.1], curves, x, y, (sure, sure), 0.001)


def test_the_page_of_a_readers_own_defence_is_accessible(folder, visit, tmp_path):
    from helpers import report

    if not AXE.exists():
        lacking("axe-core")
    page, wrong = visit(folder / "book/board.html")
    page.set_content(report.write(told(), tmp_path, "It stands nowhere.")[1].read_text())
    assert page.locator("h1").inner_text() == "mine" and not serious(page) and not wrong
    wide = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
