"""The lab's networks: written in full, read back as they were measured, not trained twice."""

import base64
import json
import re
import zlib

import numpy as np
import pytest
from conftest import ROOT, command

from helpers import attacks, data, evaluation, filters, lab, units
from helpers.threat import ThreatModel

TINY = {"dataset": "digits", "images": 200, "epochs": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the lab's two files, of networks that hardly learned, and a way to make them again."""
    base = tmp_path_factory.mktemp("lab")

    def again(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HELPERS_OUTPUT", str(base / "output"))
            patch.setenv("LOKY_MAX_CPU_COUNT", "1")
            return lab.make(folder, **TINY)[0].parent

    return again(base / "first"), again


def test_what_is_read_is_what_was_measured(made):
    folder, _ = made
    models, x, y, record = lab.read(folder / "weights.js")
    d = data.load("digits")
    assert list(models) == list(record["networks"]) == ["normal", "mixed-batch", "PGD-trained"]
    assert np.array_equal(x, d.x_test[lab.shown(d)]) and np.array_equal(y, np.repeat(np.arange(10), 10))
    for name, model in models.items():
        found = record["networks"][name]
        assert found["clean"] == pytest.approx(evaluation.score(model, d.x_test, d.y_test)["accuracy"], abs=0.003)
        blurred = filters.defend(model, "gaussian", record["sigma"])
        assert found["blurred"] == pytest.approx(evaluation.score(blurred, d.x_test, d.y_test)["accuracy"], abs=0.003)
        threat = ThreatModel("linf", record["eps"])
        beaten = attacks.fgsm(model, x, y, threat), attacks.pgd(model, x, y, threat, steps=record["steps"], start=x)
        assert [found["fgsm"], found["pgd"]] == pytest.approx([(b.value <= 0).mean() for b in beaten], abs=0.03)
        assert all(np.array_equal(w, w.astype(np.float16)) for w in model.get_weights())
    numbers = [np.concatenate([w.ravel() for w in model.get_weights()]) for model in models.values()]
    assert not any(np.array_equal(numbers[0], other) for other in numbers[1:])


def test_the_record_stands_alone_too_and_says_where_it_comes_from(made):
    folder, _ = made
    record = json.loads((folder / "record.json").read_text())
    assert record == lab.read(folder / "weights.js")[3]
    assert record["provenance"]["datasets"]["digits"]["n_train"] == 200 and record["tested"] == 500
    assert {"lab", "training", "attacks"} <= set(record["provenance"]["helpers"])
    assert record["provenance"]["seconds"] > 0 and re.fullmatch(r"[0-9a-f]{40}|v[\d.]+", record["provenance"]["commit"])


def test_nothing_is_trained_twice(made, monkeypatch, tmp_path):
    folder, again = made
    monkeypatch.setattr(units, "_compute", lambda *_: pytest.fail("trained again"))
    other = again(tmp_path)
    first, second = ((path / "weights.js").read_text().split('"record"')[0] for path in (folder, other))
    assert first == second


def test_another_set_of_digits_is_refused_before_any_training(tmp_path):
    with pytest.raises(ValueError, match=r"data: textures has images \(64, 64, 1\) in 3 classes; expected"):
        lab.make(tmp_path, "textures")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "line"), [
    (["--data", "digit"], "Error: name: unknown 'digit', did you mean 'digits'?"),
    (["--images", "0"], "Error: Invalid value for '--images': 0 is not in the range x>=1."),
    (["--data", "digits", "--images", "99999"], "Error: n_train: got 99999, expected 1 to 1297"),
])
def test_bad_input_ends_the_command_with_one_line(arguments, line, tmp_path):
    done = command("lab", *arguments, "--folder", str(tmp_path), cwd=ROOT, HELPERS_OUTPUT=str(tmp_path / "output"))
    assert done.returncode and done.stderr.splitlines()[-1].startswith(line) and "Traceback" not in done.stderr


# ── the committed files ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def committed():
    text = (ROOT / "book/_static/lab/weights.js").read_text()
    return json.loads(text[text.index("{"):text.rindex("}") + 1])


def test_the_committed_weights_are_small_and_whole(committed):
    parts = [*committed["networks"].values(), committed["pixels"]]
    raw = [base64.b64decode(part["base64"]) for part in parts]
    assert [(len(r), zlib.adler32(r)) for r in raw] == [(part["bytes"], part["adler32"]) for part in parts]
    assert sum(map(len, raw[:3])) == committed["record"]["bytes"] <= 300_000
    assert np.isfinite(np.frombuffer(b"".join(raw[:3]), "<f2")).all()


def test_the_committed_record_is_that_of_the_weights_and_of_a_clean_checkout(committed):
    assert committed["record"] == json.loads((ROOT / "book/_static/lab/record.json").read_text())
    about = committed["record"]["provenance"]
    assert about["dirty"] is False and about["datasets"]["mnist"]["n_train"] == 60_000
    assert committed["record"]["networks"]["normal"]["longest"] is None
