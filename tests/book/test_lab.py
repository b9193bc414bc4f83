"""The lab in a browser, opened as a file with the network cut: its arithmetic against Keras, and what a reader can do.

No request but for files is let through. What a network says depends on the committed weights alone, but for rounding.
"""

import json
import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, lacking
from playwright.sync_api import expect
from test_browser import AXE, SIZES, serious

from helpers import attacks, filters, lab, losses, models
from helpers.defence import Outputs, Path
from helpers.figures import COLOURS
from helpers.threat import ThreatModel

SCRIPTS = ROOT / "book/_static/lab"
SIGMA, STEPS = lab.SIGMA, lab.STEPS
expect.set_options(timeout=60_000)
FINISHED = ".lab-all:not([aria-busy])"


@pytest.fixture
def visit(browser, site):
    """Open the lab from its file in a fresh window: (page, what went wrong)."""
    windows = []

    def open_page(size="desktop", mode="light", weights=None, **options):
        window = browser.new_context(viewport=SIZES[size], color_scheme=mode, has_touch=size == "phone", **options)
        window.set_default_timeout(300_000)  # a busy machine
        windows.append(window)
        page, wrong = window.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"not loaded: {request.url}"))
        page.route(lambda address: not address.startswith(("file:", "data:", "blob:")), lambda route: route.abort())
        if weights is not None:
            page.route("**/weights.js", lambda route: route.fulfill(body=weights, content_type="text/javascript"))
        page.goto((site.output / "html/book/lab.html").as_uri())
        return page, wrong

    yield open_page
    for window in windows:
        window.close()


@pytest.fixture(scope="module")
def arithmetic(browser):
    """A window with net.js and the weights, and no page: `run(function, argument)`."""
    page = browser.new_page()
    for name in ("net.js", "weights.js"):
        page.add_script_tag(path=SCRIPTS / name)
    page.evaluate("""() => {
        window.all = lab.read(labData);
        window.defence = ({name, blur, threshold}) => (
            {layers: all.networks[name], blur: blur ? all.blur : null, threshold: threshold ?? 0});
    }""")
    yield page.evaluate
    page.close()


@pytest.fixture(scope="module")
def keras_side():
    """Networks by name, and every second one of the hundred digits."""
    networks, x, y, _ = lab.read(SCRIPTS / "weights.js")
    return networks, x[::2], y[::2]


# ── the arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("blur", [False, True])
@pytest.mark.parametrize("name", list(lab.STAGES))
def test_logits_and_gradients_are_those_of_keras(arithmetic, keras_side, name, blur):
    networks, x, y = keras_side
    model = models.as_float64(networks[name])  # so that rounding puts no ReLU on its other side
    with tf.GradientTape() as tape:
        tape.watch(images := tf.constant(np.rint(255 * x) / 255, tf.float64))
        logits = model(filters.gaussian(images, SIGMA) if blur else images, training=False)
        loss = losses.cross_entropy(logits, y)
    gradients = tape.gradient(loss, images).numpy().reshape(len(x), -1)
    found = arithmetic("""given => all.digits.filter((_, i) => i % 2 === 0).map(({image, label}) => {
        const {scores, gradient} = lab.climb(defence(given), image, label);
        return {scores: Array.from(scores), gradient: Array.from(gradient)};
    })""", {"name": name, "blur": blur})
    assert np.abs(gradients).max() > 0.1 and np.abs(logits).max() > 3 and len(found) == 50
    assert np.abs(np.array([each["scores"] for each in found]) - logits).max() < 1e-3
    assert np.abs(np.array([each["gradient"] for each in found]) - gradients).max() < 1e-3
    single = networks[name](tf.cast(images, tf.float32)) if not blur else None  # as the chapters compute
    assert single is None or np.abs(np.array([each["scores"] for each in found]) - single).max() < 1e-3


class Refusing:
    """A network that refuses where it is less sure than a threshold, perhaps behind a blur: what the page deploys."""

    randomised = False

    def __init__(self, model, blur, threshold):
        self.model, self.blur, self.threshold = model, blur, threshold

    def __call__(self, x):
        logits = self.model(filters.gaussian(x, SIGMA) if self.blur else x, training=False)
        sure = tf.reduce_max(tf.nn.softmax(logits), axis=1)
        return Outputs(logits, tf.math.log(self.threshold / sure))  # -inf where the threshold is 0

    def paths(self, seed=0):
        return {"exact": Path(self)}


CASES = [  # network, norm, eps, blur, threshold of refusal: neither all nor none of the images are beaten
    ("normal", "linf", 0.08, False, 0), ("mixed-batch", "linf", 0.05, False, 0), ("PGD-trained", "linf", 0.4, False, 0),
    ("normal", "l2", 1.5, False, 0), ("mixed-batch", "l2", 2.0, True, 0), ("normal", "linf", 0.1, True, 0.9)]


@pytest.mark.parametrize("kind", ["fgsm", "pgd"])
@pytest.mark.parametrize("case", CASES)
def test_attacks_beat_the_images_that_those_of_the_helpers_beat(arithmetic, keras_side, case, kind):
    (networks, x, y), (name, norm, eps, blur, threshold) = keras_side, case
    deployed, threat = Refusing(networks[name], blur, threshold), ThreatModel(norm, eps)

    def loss(outputs, y):
        return losses.cross_entropy(outputs.logits, y)

    wanted = (attacks.fgsm(deployed, x, y, threat, loss=loss) if kind == "fgsm" else
              attacks.pgd(deployed, x, y, threat, steps=STEPS, start=x, losses=(loss,))).value > 0
    found = arithmetic("""([given, threat]) => all.digits.filter((_, i) => i % 2 === 0).map(({image, label}) => {
        const {image: attacked, value} = lab.attack(defence(given), image, label, threat);
        return {value, image: Array.from(attacked)};
    })""", [{"name": name, "blur": blur, "threshold": threshold},
            {"norm": norm, "eps": eps, "kind": kind, "steps": STEPS}])
    beaten = np.array([each["value"] > 0 for each in found])
    images = np.array([each["image"] for each in found], "float32").reshape(x.shape)
    assert 3 <= wanted.sum() <= 47  # all or none would say nothing
    assert (beaten != wanted).sum() <= 2  # the sign of a gradient near 0 is one of rounding
    assert threat.contains(images, x).all()


def test_an_attacker_who_ignores_the_blur_is_scored_on_what_is_deployed(arithmetic):
    values = arithmetic("""() => {
        const deployed = defence({name: "normal", blur: true});
        const path = {...deployed, blur: null};
        return all.digits.map(({image, label}) => {
            const threat = {norm: "linf", eps: 0.1, kind: "pgd", steps: 20};
            const {image: attacked, value} = lab.attack(deployed, image, label, threat, {path});
            return value > 0 === (lab.outcome(deployed, attacked, label) === 2);
        });
    }""")
    assert len(values) == 100 and all(values)


def test_stopping_at_the_first_win_beats_the_same_images(arithmetic):
    ends = arithmetic("""() => all.digits.map(({image, label}) => [true, false].map(early => lab.attack(
        defence({name: "normal"}), image, label, {norm: "linf", eps: 0.06, kind: "pgd", steps: 20},
        {early}).value > 0))""")
    assert all(first == second for first, second in ends) and 0 < sum(first for first, _ in ends) < 100


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def said(page):
    return page.locator("#lab-said").inner_text()


def counted(page):
    """(right, refused, wrong) under the attack, once all hundred digits are counted for the settings of now."""
    page.wait_for_selector(FINISHED)
    line = page.locator("#lab-attacked-text").inner_text()
    return [int(number) for number in re.findall(r"(\d+) (?:right|refused|wrong)", line)]


def test_it_runs_from_a_file_without_a_network_and_says_its_result_in_words(visit):
    page, wrong = visit()
    counted(page)
    assert re.match(r"Shown this 5, the normal network answers: \d \([\d.]+\s%", said(page))
    assert sum(counted(page)) == 100 and not wrong
    expect(page.locator("#lab-status")).to_have_text(said(page))  # read out, once the reader has stopped
    expect(page.locator("#lab-all-status")).to_have_text(page.locator("#lab-attacked-text").inner_text())
    assert all(page.locator(f"#lab-{name}").get_attribute("aria-label") for name in ("image", "change", "result"))


def test_the_keyboard_alone_picks_a_digit_and_changes_epsilon_and_attack(visit):
    page, wrong = visit()
    page.locator(".lab-digits input:checked").focus()  # a group of radio buttons is one stop of the Tab key
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    assert said(page).startswith("Shown this 6, ")
    reached = []
    while "lab-eps" not in reached and len(reached) < 20:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.name || document.activeElement.id"))
        if reached[-1] == "lab-kind":
            page.keyboard.press("ArrowDown")
    assert "After PGD with L∞, ε = 0.10" in said(page) and "lab-network" in reached and "lab-blur" in reached
    before = page.locator("#lab-result").evaluate("canvas => canvas.toDataURL()")
    page.keyboard.press("End")
    assert "ε = 0.40" in said(page) and not wrong
    assert page.locator("#lab-result").evaluate("canvas => canvas.toDataURL()") != before
    page.keyboard.press("Home")
    assert "There is no attack: ε is 0." in said(page)


def touch(page, points):
    """Move a finger over the pad; points in shares of its size."""
    page.locator("#lab-pad").scroll_into_view_if_needed()
    box = page.locator("#lab-pad").bounding_box()
    send = page.context.new_cdp_session(page).send
    spots = [{"x": box["x"] + box["width"] * x, "y": box["y"] + box["height"] * y} for x, y in points]
    for kind, spot in [("touchStart", spots[0]), *(("touchMove", spot) for spot in spots), ("touchEnd", None)]:
        send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [spot] if spot else []})


def test_a_finger_draws_on_a_phone(visit):
    page, wrong = visit(size="phone")
    page.locator("#lab-eps").fill("0")
    shares = [(0.5, 0.15 + 0.07 * step) for step in range(11)]
    touch(page, shares)
    expect(page.locator("#lab-said")).to_contain_text("Shown your drawing, taken for a 1")  # a line from top to bottom
    touch(page, [(0.25, 0.15), (0.5, 0.15), (0.5, 0.5), (0.25, 0.5), (0.25, 0.15)])
    expect(page.locator("#lab-said")).not_to_contain_text("taken for a 1")
    page.locator("#lab-clear").tap()
    expect(page.locator("#lab-said")).to_contain_text("Shown this 5, ")
    assert not wrong
    assert page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth") <= 0


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_no_serious_violation(visit, mode):
    if not AXE.exists():
        lacking("axe-core")
    page, _ = visit(mode=mode)
    page.locator("#lab-refuse").check()
    counted(page)
    assert not serious(page, part="document.querySelector('main')")


def broken(how):
    text = (SCRIPTS / "weights.js").read_text()
    at = text.index('"base64"') + 1000
    return {"cut short": text[:len(text) // 2], "empty": "",
            "one letter is another": text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1:],
            "no network": text.replace('"networks"', '"other"', 1)}[how]


@pytest.mark.parametrize("how", ["cut short", "empty", "one letter is another", "no network"])
def test_a_damaged_file_of_weights_shows_a_sentence(visit, how):
    page, _ = visit(weights=broken(how))
    alert = page.locator("#lab-root [role=alert]")
    expect(alert).to_contain_text("cannot start: of its file of weights, _static/lab/weights.js, this is wrong: ")
    assert "undefined" not in alert.inner_text() and page.locator("#lab-root input").count() == 0
    assert page.locator("button[data-lab]:visible").count() == 0


def test_it_counts_in_slices_and_drops_a_count_that_is_out_of_date(visit):
    page, _ = visit()
    page.locator("[name=lab-network][value=PGD-trained]").check()
    page.locator("[name=lab-kind][value=pgd]").check()
    page.evaluate("""() => {
        window.seen = [];
        new MutationObserver(() => seen.push(document.getElementById("lab-attacked-text").textContent))
            .observe(document.getElementById("lab-attacked-text"), {childList: true});
    }""")
    counted(page)
    assert len(page.evaluate("seen")) > 5
    page.evaluate("seen.length = 0")
    page.locator("#lab-eps").fill("0.3")
    page.wait_for_function("seen.length > 1")
    page.locator("#lab-eps").fill("0.05")
    assert sum(counted(page)) == 100 and "ε = 0.05" in page.locator("#lab-attacked-text").inner_text()
    order = page.evaluate("seen.map(text => text.match(/ε = ([\\d.]+)/)[1])")
    assert order == sorted(order, reverse=True) and set(order) == {"0.30", "0.05"}


@pytest.mark.parametrize(("motion", "moves"), [("reduce", False), ("no-preference", True)])
def test_bars_move_only_where_motion_is_wanted(visit, motion, moves):
    page, _ = visit(reduced_motion=motion)
    bar = page.locator(".lab-table td i").first
    assert (bar.evaluate("bar => parseFloat(getComputedStyle(bar).transitionDuration)") > 0) == moves


def test_the_table_is_the_record_and_the_bars_agree_with_it(visit):
    page, _ = visit()
    record = json.loads((SCRIPTS / "record.json").read_text())
    rows = page.locator("#lab-measured tbody tr")
    for row, (name, found) in zip(rows.all(), record["networks"].items(), strict=True):
        shown = [f"{100 * found[what]:.1f}\xa0%" for what in ("clean", "blurred", "fgsm", "pgd")]
        assert row.locator("th").inner_text() == name and row.locator("td").all_inner_texts() == shown
    page.locator("#lab-eps").fill(str(record["eps"]))
    page.locator("[name=lab-network][value=mixed-batch]").check()
    assert abs(counted(page)[0] - 100 * record["networks"]["mixed-batch"]["fgsm"]) <= 1


def test_what_was_measured_is_what_the_scripts_find(arithmetic):
    record = json.loads((SCRIPTS / "record.json").read_text())
    wanted = [100 * found[kind] for found in record["networks"].values() for kind in ("fgsm", "pgd")]
    found = arithmetic("""({eps, steps}) => Object.keys(all.networks).flatMap(name => ["fgsm", "pgd"].map(kind =>
        all.digits.filter(({image, label}) => lab.attack(defence({name}), image, label,
            {norm: "linf", eps, kind, steps}, {early: true}).value <= 0).length))""",
                       {"eps": record["eps"], "steps": record["steps"]})
    assert np.abs(np.subtract(found, wanted)).max() <= 2


def test_what_to_try_shows_what_the_text_says(visit):
    page, _ = visit()
    tries = page.locator("button[data-lab]")

    def attempt(n):
        tries.nth(n - 1).click()
        assert page.evaluate("document.activeElement.id") == "lab-eps"
        return counted(page)

    assert tries.count() == 5
    assert attempt(1)[0] < 50  # one step is enough for most
    fgsm = attempt(2)[0]
    page.locator("[name=lab-kind][value=pgd]").check()
    assert fgsm > 60 and counted(page)[0] < 10
    linf = attempt(3)[0]
    page.locator("[name=lab-norm][value=l2]").check()
    page.locator("#lab-eps").fill("4")
    assert linf > 60 and counted(page)[0] < linf - 15
    ignorant = attempt(4)[0]
    page.locator("#lab-knows").check()
    assert 40 <= ignorant <= 60 and counted(page)[0] < ignorant / 2
    _, refused, wrong = attempt(5)
    page.locator("[name=lab-kind][value=pgd]").check()
    assert refused > 40 and counted(page)[2] > 2 * wrong


def test_its_colours_are_those_of_the_figures():
    colours = re.findall(r"--(?:before|after|right|wrong): (#[0-9a-f]{6})", (SCRIPTS / "lab.css").read_text())
    assert len(colours) == 4 and set(colours) <= set(COLOURS.values())
