"""The example of a new defence in CONTRIBUTING.md runs, and is short."""

import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from helpers import data, evaluation, models, standard, training
from helpers.defence import answers
from helpers.threat import ThreatModel

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ATTACKS = {"APGD": standard.apgd, "Square": lambda *images, **options: standard.square(*images, queries=50, **options)}


@pytest.fixture(scope="module")
def squeezing():
    """The defence on a small network, and test images."""
    d, names = data.load("digits").take(200, 20), {}
    network = models.two_conv(d.x_train.shape[1:], 10)
    training.fit(network, d.x_train, d.y_train, epochs=8, batch_size=50)
    exec(compile(EXAMPLE, "CONTRIBUTING.md", "exec"), names)  # our own text, not a reader's
    return names["FeatureSqueezing"](network, 0.2), d.x_test, d.y_test


def test_it_is_short():
    assert len(EXAMPLE.splitlines()) <= 40


def test_it_is_evaluated_with_its_three_members(squeezing):
    defence, x, y = squeezing
    report = evaluation.evaluate(defence, x, y, ThreatModel("linf", 0.15), attacks=ATTACKS, steps=20, queries=50,
                                 examined=2)
    assert set(report.attacks["path"]) <= {"", "unaware", "BPDA"}
    assert (report.found.value > 0).sum() == report.attacks["beaten"].sum() > 0
    found = answers(defence, report.found.images)
    evaded = (found.refusal <= 0) & (found.logits.argmax(axis=1) != y)
    assert report.left == pytest.approx(1 - evaded.mean())


def test_rounding_alone_has_no_gradient(squeezing):
    defence, x, _ = squeezing
    with tf.GradientTape() as tape:
        tape.watch(images := tf.constant(x))
        few = defence.network(tf.round(images * 7) / 7).logits
    gradient = tape.gradient(few, images)
    assert gradient is None or not np.any(gradient)
