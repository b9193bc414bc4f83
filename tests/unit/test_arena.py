"""A reader's own defence: what a file may hold, what is said of it, and that a misleading one is found out."""

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path as File

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

from helpers import arena, board, cli, data, evaluation, flags, guest, models, report, standard, training
from helpers.defence import Network, OneOf, Outputs, Path, answers
from helpers.threat import ThreatModel

THREAT = ThreatModel("linf", 0.1)
EXAMPLE = File(__file__).parents[2] / "book/my_defence.py"
FEW = {"APGD": lambda *images, **options: standard.apgd(*images, steps=10, **options),
       "Square": lambda *images, **options: standard.square(*images, queries=20, **options)}


def shaped(*layers, shape=(28, 28, 1)):
    return keras.Sequential([keras.Input(shape), *layers])


@pytest.fixture(scope="module")
def dataset():
    return data.load("digits").take(300, 20)


@pytest.fixture(scope="module")
def network(dataset):
    keras.utils.set_random_seed(0)
    model = shaped(keras.layers.Flatten(), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(10))
    training.fit(model, dataset.x_train, dataset.y_train, epochs=20, batch_size=50)
    return model


@pytest.fixture(scope="module")
def saved(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.keras"
    network.save(path)
    return path


def shorten(patched):
    """Make the standard set and the checks short."""
    whole = arena.judge
    patched.setattr(standard, "STANDARD", FEW)
    patched.setattr(arena, "judge", lambda *images, **options: whole(
        *images, steps=6, queries=20, examined=2, **options))


@pytest.fixture
def quick(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def plain(network, dataset):
    """The bare network's entry, which tests of the page share."""
    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        return arena.examine(network, dataset, THREAT, name="plain", images=8)


def written(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return path


def raised(entry):
    return set(entry.report.flags["check"][~entry.report.flags["passed"]])


def command(*arguments, folder):
    """The command `arena` on digits, 8 images, with what it makes in `folder`."""
    return CliRunner(env={"HELPERS_OUTPUT": str(folder)}).invoke(
        cli.main, ["arena", *map(str, arguments), "--data", "digits", "--images", "8"])


# ── What a file may hold ──


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "no function `defence`"),
    ("def defence():\n    return 1 / 0", "line 2: ZeroDivisionError"),
    ("import nothing_of_that_name", "ModuleNotFoundError"),
    ("def defence(:", "SyntaxError"),
])
def test_a_file_that_holds_no_defence_is_named_with_the_reason(tmp_path, text, message):
    with pytest.raises(guest.ArenaError, match="mine.py") as error:
        guest.opened(written(tmp_path, text))
    assert message in str(error.value)


def test_other_files_and_damaged_networks_are_refused(tmp_path):
    (tmp_path / "mine.keras").write_bytes(b"no network")
    (tmp_path / "mine.txt").write_text("")
    for name in ("mine.keras", "mine.txt"):
        with pytest.raises(guest.ArenaError, match=name):
            guest.opened(tmp_path / name)


FOLLOWED = """from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Scale:
    by: float

def defence():
    def network(x):
        import sibling
        return sibling.linear(x) * Scale(2.0).by
    return network
"""


def test_what_a_file_imports_when_it_is_called_is_found_and_float64_has_a_gradient(tmp_path, dataset):
    (tmp_path / "sibling.py").write_text(
        "import numpy as np\nimport tensorflow as tf\nW = np.random.default_rng(0).normal(size=(784, 10))\n"
        "def linear(x):\n    return tf.reshape(tf.cast(x, tf.float64), (-1, 784)) @ W\n")
    defence = guest.brought(guest.opened(written(tmp_path, FOLLOWED)), dataset.x_test)
    assert not isinstance(defence, guest.Arrays) and answers(defence, dataset.x_test).logits.dtype == np.float32


def test_a_file_that_ends_the_process_is_named(tmp_path):
    with pytest.raises(arena.ArenaError, match="line 2: SystemExit: no weights"):
        guest.opened(written(tmp_path, "import sys\nsys.exit('no weights')\n"))


def test_the_time_of_an_answer_is_not_that_of_a_remembered_one(dataset):
    def slow(x):
        time.sleep(0.2)
        return np.asarray(x).reshape(len(x), -1)[:, :10]

    x = dataset.x_test[:10]
    assert arena.seconds_per_image(guest.brought(slow, x), x) >= 0.02


def test_a_saved_network_is_opened(saved, network, dataset):
    found = guest.brought(guest.opened(saved), dataset.x_test)
    np.testing.assert_allclose(found(dataset.x_test[:2]).logits, network(dataset.x_test[:2], training=False), atol=1e-5)


def test_a_saved_network_that_is_random_says_so_by_an_option(tmp_path, dataset):
    noise = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    noise.save(tmp_path / "net.keras")
    assert models.randomised(guest.opened(tmp_path / "net.keras", randomised=True))
    assert not models.randomised(guest.opened(tmp_path / "net.keras"))


# ── Bad input: a clear sentence ──


@pytest.mark.parametrize(("build", "message"), [
    (lambda net: 7, "expected a Keras network"),
    (lambda net: shaped(net, keras.layers.Softmax()), "probabilities.*give the logarithm"),
    (lambda net: lambda x: tf.nn.softmax(net(x, training=False)), "probabilities"),
    (lambda net: shaped(keras.layers.Flatten(), keras.layers.Dense(10), shape=(1, 28, 28)), "channels first"),
    (lambda net: lambda x: net(x[:, 0], training=False), r"raises on images of shape \(8, 28, 28, 1\).*channels last"),
    (lambda net: shaped(keras.layers.Flatten(), keras.layers.Dense(10), shape=(32, 32, 1)), "28, 28, 1.*32, 32, 1"),
    (lambda net: shaped(net, keras.layers.Dense(3)), "3 classes; expected 10"),
    (lambda net: shaped(net, keras.layers.Rescaling(np.nan)), "NaN"),
    (lambda net: lambda x: net(x, training=False) * np.nan, "NaN"),
    (lambda net: lambda x: tf.argmax(net(x, training=False), axis=1), r"expected logits of shape \(n, classes\)"),
    (lambda net: lambda x: 1 / 0, "it raises on images .*ZeroDivisionError"),
    (lambda net: lambda x: net(x + tf.random.normal(tf.shape(x)), training=False), "differently.*randomised = True"),
    (lambda net: lambda x: Outputs(net(x, training=False), tf.zeros(len(x))), "has no `paths"),
])
def test_what_does_not_answer_as_expected_is_refused_in_words(network, dataset, build, message):
    with pytest.raises(guest.ArenaError, match=f"^mine: .*{message}"):
        arena.examine(build(network), dataset, THREAT, name="mine", images=8)


class Own:
    """Three members around a network; what is wrong with it is said by the test."""

    randomised = False

    def __init__(self, network, refusal=lambda x: -tf.ones_like(x[:, 0, 0, 0]), ways=None):
        self.network, self.refusal, self.ways = Network(network), refusal, ways

    def __call__(self, x):
        return Outputs(self.network(x).logits, self.refusal(x))

    def paths(self, seed=0):
        return {"exact": Path(self)} if self.ways is None else self.ways()


@pytest.mark.parametrize(("options", "message"), [
    ({"refusal": lambda x: x[:, 0, 0]}, "refusal has shape"),
    ({"refusal": lambda x: np.nan * x[:, 0, 0, 0]}, "NaN"),
    ({"refusal": lambda x: tf.random.normal(tf.shape(x)[:1])}, "differently"),
    ({"ways": dict}, "paths.. of the defence gives {}"),
    ({"ways": lambda: {"exact": 3}}, "name -> Path"),
    ({"ways": lambda: 1 / 0}, "ZeroDivisionError"),
])
def test_members_that_do_not_answer_as_expected_are_refused_in_words(network, dataset, options, message):
    with pytest.raises(guest.ArenaError, match=f"^mine: .*{message}"):
        arena.examine(Own(network, **options), dataset, THREAT, name="mine", images=8)


def test_undeclared_randomness_of_a_network_is_refused(network, dataset):
    class Noise(keras.layers.Layer):
        def call(self, x):
            return x + tf.random.normal(tf.shape(x))

    with pytest.raises(guest.ArenaError, match="differently"):
        arena.examine(shaped(Noise(), network), dataset, THREAT, images=8)


def test_nan_that_only_an_attack_meets_is_said(quick, network, dataset):
    def brittle(x):
        return network(x, training=False) / tf.where(tf.reduce_all(tf.abs(x * 255 - tf.round(x * 255)) < 1e-3),
                                                         1.0, np.nan)

    with pytest.raises(guest.ArenaError, match="mine: while it was attacked: .*(NaN|not finite)"):
        arena.examine(brittle, dataset, THREAT, name="mine", images=8)


def test_more_images_than_there_are_is_said(network, dataset):
    with pytest.raises(guest.ArenaError, match="images: got 21, expected 1 to 20, which digits has"):
        arena.examine(network, dataset, THREAT, images=21)


def test_a_gradient_that_is_not_finite_is_said_with_what_to_try(quick, network, dataset):
    def rooted(x):
        return network(x, training=False) + tf.sqrt(tf.nn.relu(x[:, :1, 0, 0] - 2))

    with pytest.raises(guest.ArenaError, match="mine: while it was attacked: .*not finite.*add a little"):
        arena.examine(rooted, dataset, THREAT, name="mine", images=8)


# ── Bad input: a flag ──


def test_a_defence_that_refuses_everything_is_not_sound(quick, network, dataset):
    entry = arena.examine(Own(network, lambda x: tf.ones_like(x[:, 0, 0, 0])), dataset, THREAT, images=8)
    assert entry.report.left == 1
    assert "clean images refused" in raised(entry)


def constant(x):
    return tf.zeros_like(x[:, :10, 0, 0]) + 5 * tf.eye(10)[3]


constant.randomised = False


def test_a_defence_without_features_cannot_be_tested_and_is_not_sound(quick, dataset):
    assert arena.NO_READOUT in raised(arena.examine(constant, dataset, THREAT, images=8))


class Coin:
    """A defence that is wrong on a share of its draws, whatever the image, and may refuse instead."""

    randomised = True

    def __init__(self, wrong, refuses=False):
        self.wrong, self.refuses, self.rng = wrong, refuses, np.random.default_rng(0)

    def __call__(self, x):
        n = len(x)
        wrong = tf.constant(self.rng.random(n) < self.wrong)
        label = tf.where(wrong, 1, 0)
        refused = tf.where(wrong, -1.0, 1.0 if self.refuses else -1.0)
        return Outputs(5 * tf.one_hot(label, 10), refused)

    def paths(self, seed=0):
        return {"exact": Path(self)}


@pytest.mark.parametrize(("coin", "outcome"), [
    (Coin(0.2), 0), (Coin(0.8), 2), (Coin(0.2, refuses=True), 1)], ids=["right", "wrong", "refused"])
def test_a_random_defence_loses_what_most_of_its_draws_lose_and_no_lucky_one(coin, outcome):
    x, y = np.zeros((200, 2, 2, 1), "float32"), np.zeros(200, int)
    found = evaluation.Found(x, np.ones(200, "float32"), np.zeros(200, int))  # all of them called beaten
    assert np.mean(arena.at_worst(coin, found, y) == outcome) > 0.9
    assert np.mean((found.value > 0) == (outcome == 2)) > 0.9


def test_a_lucky_draw_of_a_random_defence_does_not_end_the_attack(monkeypatch):
    coin, met = Coin(0.2), []
    x, y = np.zeros((200, 2, 2, 1), "float32"), np.zeros(200, int)

    def better(defence, images, labels, threat, **options):  # what it finds, most draws lose
        met.append(len(images))
        defence.wrong = 0.8
        return evaluation.Found(images, np.ones(len(images), "float32"), np.zeros(len(images), int)), None

    monkeypatch.setattr(standard, "standard", better)
    found = evaluation.Found(x, np.ones(200, "float32"), np.zeros(200, int))  # by a lucky draw each
    assert np.mean(arena.pressed(coin, x, y, THREAT, found) == 2) > 0.9
    assert 180 < met[0] <= 200 and sum(met[1:]) < 40  # those that most draws do not lose are attacked again
    met.clear()
    one, (x, y) = Network(constant), arena.chosen(data.load("digits"), 4)  # one answer an image: there is no luck
    arena.pressed(one, x, y, THREAT, evaluation.Found(x, np.ones(4, "float32"), np.zeros(4, int)))
    assert not met


def test_tests_of_one_answer_are_not_made_where_an_image_gets_two(network, dataset):
    blur = OneOf([network, network])
    last = list(blur.paths().values())[-1]
    assert not models.randomised(last.outputs)  # the mean of all
    assert arena._tested(blur, last, dataset.x_test[:2], dataset.y_test[:2], THREAT, 2, 0) == []


def test_a_defence_that_guesses_is_not_sound():
    x, y = arena.chosen(data.load("digits"), 200)
    rows = arena._own(Network(constant), x, y, answers(constant, x), evaluation.outcomes(constant, x, y))
    assert [row["check"] for row in rows if not row["passed"]] == ["clean images right"]


def test_weights_that_change_by_being_asked_are_found_out(quick, network, dataset):
    drift = tf.Variable(tf.zeros(10))

    def changing(x):
        drift.assign_add(tf.eye(10)[0] * 1e-4)
        return network(x, training=False) + drift

    entry = arena.examine(changing, dataset, THREAT, images=8)
    assert "answers after the evaluation as before it" in raised(entry)


def test_answers_that_hang_on_the_other_images_are_found_out(quick, network, dataset):
    def crowd(x):
        return network(x - tf.reduce_mean(x, axis=0) + 0.1, training=False)

    assert "answers to an image alone as among others" in raised(arena.examine(crowd, dataset, THREAT, images=8))


@pytest.mark.parametrize("declared", [False, True])
def test_a_function_of_arrays_has_no_gradient_and_says_so(quick, dataset, declared):
    dense = [weights.numpy() for weights in shaped(keras.layers.Flatten(), keras.layers.Dense(10)).weights]

    def arrays(x):
        return np.asarray(x).reshape(len(x), -1) @ dense[0] + dense[1]

    if declared:
        arrays.randomised = False
    entry = arena.examine(arrays, dataset, THREAT, images=8)
    assert any(check.startswith("images with a gradient") for check in raised(entry))


# ── Held-out defences, which no helper knows: found out, or beaten ──

NETWORK = "import keras\nimport numpy as np\nimport tensorflow as tf\nnet = keras.saving.load_model({path!r})\n"
HELD_OUT = {
    "masked": "def defence():\n    return lambda x: 1000 * net(x, training=False)\n",
    "few levels": "def defence():\n    return lambda x: net(tf.round(3 * x) / 3, training=False)\n",
    "resize": """
def defence():
    def resized(x):
        side = int(np.random.randint(24, 33))
        return net(tf.image.resize_with_crop_or_pad(tf.image.resize(x, (side, side)), 28, 28), training=False)
    resized.randomised = True
    return resized
""",
    "neighbours": """
from sklearn.neighbors import KNeighborsClassifier
from helpers import closeness, data
def defence():
    d = data.load("digits").take(300, 20)
    knn = KNeighborsClassifier(5).fit(closeness.activations(net, d.x_train), d.y_train)
    def votes(x):
        return np.log(knn.predict_proba(closeness.activations(net, np.asarray(x))) + 1e-3)
    return votes
""",
    "ensemble": """
from helpers.defence import Outputs, Path
class Agree:
    randomised = False
    def __call__(self, x):
        each = tf.stack([net(turned, training=False) for turned in (x, tf.roll(x, 1, 1), tf.roll(x, 1, 2))])
        apart = tf.reduce_max(tf.math.reduce_variance(tf.nn.softmax(each), axis=0), axis=1)
        return Outputs(tf.reduce_mean(each, axis=0), apart - 0.06)
    def paths(self, seed=0):
        return {"exact": Path(self)}
def defence():
    return Agree()
""",
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_defence_gets_a_sound_verdict_or_a_raised_flag(quick, saved, tmp_path, name):
    done = command(written(tmp_path, NETWORK.format(path=str(saved)) + HELD_OUT[name]), folder=tmp_path)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "arena/mine.json").read_text())
    flags = {flag["check"] for flag in told["flags"] if not flag["passed"]}
    assert all(f"RAISED {check}" in done.output for check in flags)
    assert (report.UNTESTED in done.output) == (name in ("resize", "neighbours"))
    if name in ("masked", "few levels", "neighbours"):  # no gradient that an attack could follow: never a clean bill
        assert any("gradient" in check for check in flags) and "NOT SOUND" in done.output
    else:  # a real gradient: at this radius the network behind it keeps little, and neither does the defence
        assert told["left"] < 0.7 * (1 - told["clean"]["evaded"]) or flags


# ── What is told ──


def test_every_flag_has_its_question_and_its_advice(plain):
    checks = [*plain.report.flags["check"], arena.NO_READOUT, arena.NO_INDICATORS, "images with the same answer twice",
              "answers after the evaluation: images right before less after", "white box less transfer",
              "the whole set less PGD"]
    assert all(report.asks(check).endswith("?") and report.advice(check).endswith(".") for check in checks)


class Tags(HTMLParser):
    """What a page holds: its tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_needs_nothing_else_and_can_be_read_without_eyes(plain, tmp_path):
    told, page = report.write(plain, tmp_path, "It stands nowhere.")
    text, summary = page.read_text(), json.loads(told.read_text())
    tags = Tags(text).found
    assert ("html", {"lang": "en"}) in tags and [tag for tag, _ in tags].count("h1") == 1
    assert all(about["alt"] and about["src"].startswith("data:") for tag, about in tags if tag == "img")
    assert all(about.get("scope") in ("row", "col") for tag, about in tags if tag == "th")
    assert "://" not in text and "<script" not in text and "It stands nowhere." in text
    assert f"<strong>{100 * summary['left']:.1f} %</strong>" in text
    assert all(flag["check"].split(":")[0] in text for flag in summary["flags"])
    assert summary["left_low"] <= summary["left"] <= summary["left_high"] and summary["images"] == 8


def test_pages_and_lines_say_what_was_raised_and_what_to_try(quick, network, dataset, tmp_path):
    entry = arena.examine(lambda x: 1000 * network(x, training=False), dataset, THREAT, name="masked", images=8)
    assert any("gradient of the cross-entropy" in check for check in raised(entry))
    text, lines = report.write(entry, tmp_path)[1].read_text(), "\n".join(report.lines(entry))
    assert "Not sound" in text and "What to try" in text and "saturates" in text
    assert "NOT SOUND" in lines and "saturates" in lines


def test_the_worked_example_is_short_and_goes_through_the_command(quick, tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    done = command(EXAMPLE, folder=tmp_path)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "arena/my_defence.json").read_text())
    assert told["clean"]["correct"] > 0.5 and {"unaware", "exact"} <= {row["path"] for row in told["attacks"]}
    assert re.search(r"\d% of 8 images are left .* on digits at linf, eps 0\.1", done.output)
    assert (tmp_path / "arena/my_defence.html").exists() and "board" in done.output


def test_the_command_ends_with_one_line_where_the_file_holds_no_defence(tmp_path):
    done = command(written(tmp_path, "x = 1"), folder=tmp_path)
    assert done.exit_code == 1
    assert done.output.startswith("Error: ") and len(done.output.splitlines()) == 1


# ── The board ──

ROW = {"defence": "none", "chapter": "02_mixed_batch_adversarial_training", "data": "digits", "norm": "linf",
       "eps": 0.1, "images": 8, "attacks": 6, "clean": 1.0, "refused": 0.0, "ignored": 0.6, "left": 0.5,
       "left_low": 0.2, "left_high": 0.8, "certified": None, "sound": True, "raised": "",
       "parameters": 10, "milliseconds": 0.1, "training": 1.0}


def rows(*left, **other):
    return [ROW | {"defence": f"d{i}", "left": share, "left_low": 0.0, "left_high": 1.0} | other
            for i, share in enumerate(left)]


@pytest.mark.parametrize(("given", "told", "sentence"), [
    ([], {}, "no record yet"),
    (rows(0.9, 0.2), {}, r"at place 2 of 3: below d0 \(90.0%\) and above d1 \(20.0%\)"),
    (rows(0.2), {}, r"at place 1 of 2: above d0"),
    (rows(0.9), {}, r"at place 2 of 2: below d0"),
    (rows(0.9, sound=False), {}, "at place 1 of 1: alone"),
    (rows(0.9, 0.2), {"sound": False}, "below the 2 sound defences.*more than its 50.0% is left of 1"),
    (rows(0.9, eps=0.3), {}, "no rows for digits at L∞, ε = 0.1; it has digits at L∞, ε = 0.3"),
])
def test_a_defence_is_given_its_place(given, told, sentence):
    found = board.place({"data": "digits", "norm": "linf", "eps": 0.1, "left": 0.5, "sound": True} | told, given)
    assert re.search(sentence, found)


def test_unsound_rows_stand_below_the_others():
    class Kept:
        tables = {"board": rows(0.5, 0.9) + rows(0.95, sound=False) + rows(0.1, norm="l2", eps=1.5)}

    assert [row["left"] for row in board.rows(Kept)] == [0.9, 0.5, 0.95, 0.1] and board.rows(None) == []


def test_defences_are_ordered_by_the_threats_that_all_have_met():
    hard = rows(0.1, norm="l2", eps=3.0)  # which only d0 has met
    drawn = board.figure(rows(0.6, 0.5) + hard)
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["d0", "d1"]


@pytest.mark.parametrize(("rows", "note", "sound"), [
    ([], "not examined", False), ([flags.flag("x", 1, 1, ">=", 9)], board.UNTESTED, True),
    ([flags.flag("indicator: x", 1, 1, ">=", 9)], "", True), ([flags.flag("x", 0, 1, ">=", 9)], "x", False)])
def test_a_row_says_whether_its_attack_was_tested(rows, note, sound):
    run = {"clean": np.zeros(4, int), "worst": np.zeros(4, int), "ignored": np.ones(4, bool), "flags": rows,
           "attacks": 6, "milliseconds": 1.0}
    row = board.row("d", "digits", ("linf", 0.1), run, certified=None, parameters=1, training=1.0)
    assert (row["raised"], row["sound"]) == (note, sound)


@pytest.mark.parametrize("given", [[], rows(0.5, 0.9) + rows(0.95, 0.1, norm="l2", eps=1.5, sound=False)])
def test_the_figure_has_a_panel_for_each_threat(given):
    drawn = board.figure(given)
    assert len(drawn.axes) == (2 if given else 1)
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert labels == (["d0 †", "d1 †"] if given else [])
