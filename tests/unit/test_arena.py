"""A reader's own defence: what a file may hold, what is said of it, and that a misleading one is found out."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

from helpers import arena, cli, data, models, standard, training
from helpers.defence import Network, Outputs, Path
from helpers.threat import ThreatModel

THREAT = ThreatModel("linf", 0.1)
FEW = {"APGD": lambda *images, **options: standard.apgd(*images, steps=10, **options),
       "Square": lambda *images, **options: standard.square(*images, queries=20, **options)}


@pytest.fixture(scope="module")
def dataset():
    return data.load("digits").take(300, 20)


@pytest.fixture(scope="module")
def network(dataset):
    model = models.two_conv(dataset.x_train.shape[1:], 10)
    training.fit(model, dataset.x_train, dataset.y_train, epochs=6, batch_size=50)
    return model


@pytest.fixture
def quick(monkeypatch):
    """The standard set, short."""
    monkeypatch.setattr(standard, "STANDARD", FEW)


def written(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return path


def raised(entry):
    return set(entry.report.flags["check"][~entry.report.flags["passed"]])


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "no function `defence`"),
    ("def defence():\n    return 1 / 0", "line 2: ZeroDivisionError"),
    ("import nothing_of_that_name", "ModuleNotFoundError"),
    ("def defence():\n    return 7", "expected a Keras network"),
    ("def defence(:", "SyntaxError"),
])
def test_a_file_that_holds_no_defence_is_named_with_the_reason(tmp_path, text, message):
    with pytest.raises(arena.ArenaError, match="mine.py") as error:
        arena.opened(written(tmp_path, text))
    assert message in str(error.value)


def test_other_files_and_damaged_networks_are_refused(tmp_path):
    (tmp_path / "mine.keras").write_bytes(b"no network")
    (tmp_path / "mine.txt").write_text("")
    for name in ("mine.keras", "mine.txt"):
        with pytest.raises(arena.ArenaError, match=name):
            arena.opened(tmp_path / name)


def test_a_saved_network_is_opened(tmp_path, network, dataset):
    network.save(tmp_path / "mine.keras")
    found = arena.opened(tmp_path / "mine.keras")
    np.testing.assert_allclose(found(dataset.x_test[:2]).logits, network(dataset.x_test[:2], training=False), atol=1e-5)


@pytest.mark.parametrize(("build", "message"), [
    (lambda network: keras.Sequential([network, keras.layers.Softmax()]), "probabilities"),
    (lambda network: keras.Sequential([keras.Input((1, 28, 28)), keras.layers.Flatten(), keras.layers.Dense(10)]),
     "channels first"),
    (lambda network: keras.Sequential([network, keras.layers.Dense(3)]), "3 classes"),
    (lambda network: keras.Sequential([network, keras.layers.Rescaling(np.nan)]), "NaN"),
])
def test_networks_that_answer_otherwise_than_expected_are_refused(network, dataset, build, message):
    with pytest.raises(arena.ArenaError, match=message):
        arena.examine(build(network), dataset, THREAT, images=8)


def test_undeclared_randomness_is_refused(network, dataset):
    def noisy(x):
        return network(x + tf.random.normal(tf.shape(x)), training=False)

    noisy.randomised = False
    with pytest.raises(arena.ArenaError, match="differently"):
        arena.examine(noisy, dataset, THREAT, images=8)


class RefusesAll:
    """What is left of it is all, and worth nothing."""

    randomised = False

    def __init__(self, network):
        self.network = Network(network)

    def __call__(self, x):
        logits = self.network(x).logits
        return Outputs(logits, tf.ones_like(logits[:, 0]))

    def paths(self, seed=0):
        return {"exact": Path(self)}


def test_a_defence_that_refuses_everything_is_not_sound(quick, network, dataset):
    entry = arena.examine(RefusesAll(network), dataset, THREAT, images=10)
    assert entry.report.left == 1
    assert "clean images refused" in raised(entry)


def test_a_masked_network_is_found_out_and_the_page_says_what_to_try(quick, network, dataset, tmp_path):
    def masked(x):
        return 1000 * network(x, training=False)

    masked.randomised = False
    entry = arena.examine(masked, dataset, THREAT, name="masked", images=10)
    assert any("gradient of the cross-entropy" in check for check in raised(entry))
    told, page = arena.write(entry, tmp_path)
    summary = json.loads(told.read_text())
    assert not summary["sound"] and summary["left"] == entry.report.left
    assert summary["left_low"] <= summary["left"] <= summary["left_high"]
    text = page.read_text()
    assert "Not sound" in text and "saturates" in text and "http" not in text.replace("<!doctype html>", "")


def test_every_flag_has_its_advice(quick, network, dataset):
    entry = arena.examine(network, dataset, THREAT, images=10)
    assert all(arena.advice(check) for check in entry.report.flags["check"])


def test_the_command_ends_with_one_line_where_the_file_holds_no_defence(tmp_path):
    done = CliRunner().invoke(cli.main, ["arena", str(written(tmp_path, "x = 1"))])
    assert done.exit_code == 1
    assert done.output.startswith("Error: ") and len(done.output.splitlines()) == 1
