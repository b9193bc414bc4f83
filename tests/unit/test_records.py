"""Records: the schema, the verdict rules, what is refused, and where the numbers are said to come from."""

import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers import flags, provenance, records, verdicts
from helpers.records import Record
from helpers.tracing import NO_COMPUTE
from helpers.verdicts import Claim, claims, compare

ROOT = Path(__file__).parents[2]
CHAPTER = "02_mixed_batch_adversarial_training"
DATASETS = {"mnist": {"source": "mirror", "sha256": "0" * 64, "n_train": 60000, "n_test": 10000}}
ACCURACY = "02.sec4.test_accuracy"  # number, 0.9892, tolerance 0.004
ORDER = "02.sec3.mixed_more_robust"


def start(profile="quick", chapter=CHAPTER):
    return Record.start(chapter, profile, DATASETS)


@pytest.fixture
def own_claims(monkeypatch):
    """Claims of each kind for chapter 02, one number with columns, and one on substituted data."""
    kinds = [
        {"id": "02.number", "kind": "number", "value": 0.9892, "tolerance": 0.004},
        {"id": "02.columns", "kind": "number", "value": {"clean": 0.9, "fgsm": 0.5}, "tolerance": 0.05},
        {"id": "02.order", "kind": "order", "value": None},
        {"id": "02.choice", "kind": "choice", "value": 0.1},
        {"id": "02.shown", "kind": "shown", "value": None},
        {"id": "02.rate", "kind": "number", "value": 0.05, "tolerance": 0.01, "rate": True},
        {"id": "05.number", "kind": "number", "value": 0.9, "tolerance": 0.05},
    ]
    found = {kind["id"]: Claim(where="Table I", what="something", **kind) for kind in kinds}
    for module in (records, verdicts):
        monkeypatch.setattr(module, "claims", lambda path=None: found)
    return found


# ── the claims ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_claim_of_the_book_is_complete():
    text = yaml.safe_load((ROOT / "book/claims.yml").read_text())
    known = claims()
    assert len(known) == len(text["claims"]) >= 73, "two claims share an id, or one is gone"
    for claim in known.values():
        assert re.fullmatch(r"\d\d\.\w+(\.\w+)+", claim.id)
        assert claim.id[:2] in text["papers"]
        assert not claim.what.count("(") - claim.what.count(")"), f"{claim.id}: a comma has cut its text: {claim.what}"
        assert (claim.tolerance > 0 and claim.value is not None) == (claim.kind == "number"), claim.id
        assert claim.kind != "choice" or claim.value is not None


def test_a_claim_with_an_unquoted_comma_is_refused(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text("claims:\n- {id: 02.a, where: Table I, what: the 10,000 images, kind: order, value: null}\n")
    with pytest.raises(ValueError, match="000 images"):
        claims(path)


def test_an_installed_package_brings_the_claims_along(tmp_path, monkeypatch):
    shutil.copy(ROOT / "book/claims.yml", tmp_path)
    monkeypatch.setattr(verdicts, "_PACKAGE", tmp_path)
    assert claims() == claims(ROOT / "book/claims.yml")


# ── the verdicts ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("id", "values", "options", "expected"), [
    ("02.number", [0.9892], {}, "reproduced"),
    ("02.number", [0.9852], {}, "reproduced"),  # at the edge of the tolerance, which binary fractions miss
    ("02.number", [0.9932], {}, "reproduced"),
    ("02.number", [0.9851], {}, "not-reproduced"),
    ("02.number", [0.9851], {"direction": True}, "direction"),
    ("02.number", [0.9851], {"direction": False}, "not-reproduced"),
    ("02.number", [0.9892], {"direction": False}, "reproduced"),
    ("02.number", 0.9892, {}, "reproduced"),
    ("02.number", [0.97, 0.98, 0.99], {}, "undecided"),  # mean 0.98, off by 0.0092; two standard errors are 0.0115
    ("02.number", [0.97, 0.98, 0.99], {"direction": True}, "undecided"),
    ("02.number", [0.979, 0.98, 0.981], {}, "not-reproduced"),
    ("02.number", [0.9, 0.9892, 1.0784], {}, "reproduced"),  # the mean decides, however wide the spread
    ("02.number", [0.5, 0.6, 0.7], {"direction": True}, "direction"),
    ("02.rate", [0.16], {"direction": True}, "not-reproduced"),  # three times the paper's
    ("02.rate", [0.14], {"direction": True}, "direction"),
    ("02.rate", [0.016], {"direction": True}, "not-reproduced"),
    ("02.rate", [0.018], {"direction": True}, "direction"),
    ("02.columns", {"clean": [0.91], "fgsm": [0.46]}, {}, "reproduced"),
    ("02.columns", {"clean": [0.91], "fgsm": [0.30]}, {}, "not-reproduced"),
    ("02.columns", {"clean": [0.91], "fgsm": [0.30]}, {"direction": True}, "direction"),
    ("05.number", [0.9], {}, "direction"),  # other data than the paper's
    ("05.number", [0.5], {}, "not-reproduced"),
    ("05.number", [0.5, 0.9], {}, "not-reproduced"),  # nor does a wide spread make it agree
    ("02.order", [0.1, 0.11, 0.09], {}, "reproduced"),
    ("02.order", [0.1, 0.1], {}, "reproduced"),
    ("02.order", [0.1], {}, "direction"),  # one seed has no standard error
    ("02.order", [0.3, -0.1, 0.1], {}, "direction"),
    ("02.order", [0.0, 0.0], {}, "not-reproduced"),
    ("02.order", [-0.1, -0.11], {}, "not-reproduced"),
    ("02.order", {"a": [0.1, 0.1], "b": [0.1, 0.1]}, {}, "reproduced"),
    ("02.order", {"a": [0.1, 0.1], "b": [-0.1, -0.1]}, {}, "not-reproduced"),
    ("02.choice", [0.1], {}, "reproduced"),
    ("02.choice", [0.1, 0.1, 0.1], {}, "reproduced"),
    ("02.choice", np.float32([0.1]), {}, "reproduced"),
    ("02.choice", [0.05, 0.15], {}, "not-reproduced"),  # a mean that nobody chose
    ("02.choice", [1.0], {}, "not-reproduced"),
    ("02.choice", [1.0], {"choice_tie": True}, "reproduced"),
    ("02.shown", [0.4], {"direction": True}, "reproduced"),
    ("02.shown", {"nr": [0.4], "dnr": [0.5]}, {"direction": False}, "not-reproduced"),
])
def test_verdict(own_claims, id, values, options, expected):
    for profile in ("quick", "paper"):
        assert start(profile, "05_x" if id[:2] == "05" else CHAPTER).claim(id, values, **options) == expected
    assert start("smoke", "05_x" if id[:2] == "05" else CHAPTER).claim(id, values, **options) == "not-testable"


def test_order_needs_two_standard_errors(own_claims):
    spread = np.array([-1.0, 1.0, -1.0, 1.0])
    error = spread.std(ddof=1) / 2
    assert start().claim("02.order", spread + 2.001 * error) == "reproduced"
    assert start().claim("02.order", spread + 1.999 * error) == "direction"


def test_a_tolerance_within_two_standard_errors_is_undecided(own_claims):
    spread = np.array([-0.01, 0.0, 0.01])  # standard error 0.00577
    reach = 0.004 + 2 * 0.01 / 3**0.5
    assert start().claim("02.number", 0.9892 + reach - 1e-5 + spread) == "undecided"
    assert start().claim("02.number", 0.9892 + reach + 1e-5 + spread) == "not-reproduced"


def test_old_records_are_judged_by_todays_rules(own_claims):
    record = start("paper")
    for id, values in (("02.number", [0.97, 0.98, 0.99]), ("02.rate", [0.3])):
        record.claim(id, values)
    record.claim("02.shown", [0.4], direction=True)
    record.claim("02.columns", None, "a note")
    for outcome in record.claims[:2]:
        outcome.verdict = "reproduced"
    again = [outcome.verdict for outcome in record.judged_again().claims]
    assert again == ["undecided", "not-reproduced", "reproduced", "not-testable"]
    assert [outcome.verdict for outcome in record.claims[:2]] == ["reproduced"] * 2


@pytest.mark.parametrize(("id", "values", "reason"), [
    ("02.number", [0.9892], "off by 0, tolerance 0.004"),
    ("02.number", [0.9852], "off by 0.004, tolerance 0.004"),
    ("02.number", [0.5], "off by 0.489, tolerance 0.004"),
    ("02.number", [0.97, 0.98, 0.99],
     "off by 0.0092, tolerance 0.004, two standard errors 0.0115; 1 of the 3 values within the tolerance"),
    ("02.number", [0.97, 0.98, 0.98], "off by 0.0125, tolerance 0.004"),
    ("02.number", [0.97, 0.995, 0.97, 0.995],
     "off by 0.0067, tolerance 0.004, two standard errors 0.0144; none of the 4 values within the tolerance"),
    ("05.number", [0.89], "off by 0.01 on other data than the paper's, tolerance 0.05"),
    ("02.order", [0.1, 0.2], ""),
])
def test_a_number_says_how_far_it_is_off_and_how_sure_that_is(own_claims, id, values, reason):
    for note in ("", "our note"):
        record = start(chapter=f"{id[:2]}_x")
        record.claim(id, values, note)
        assert record.claims[-1].note == note
        assert list(record.comparison()["Note"]) == ["; ".join(filter(None, [reason, note]))]
    record = start("smoke", f"{id[:2]}_x")
    record.claim(id, values, "our note")
    assert list(record.comparison()["Note"]) == ["our note"]  # there was nothing to judge


def test_a_claim_without_values_is_not_testable():
    record = start()
    assert record.claim(ACCURACY, None, note="the paper's data is not public") == "not-testable"
    assert record.claims[0].ours is None
    with pytest.raises(ValueError, match="note: '02.table1.normal_adv_loss' has no values, expected a note"):
        record.claim("02.table1.normal_adv_loss", None)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_the_measurement_is_the_sample_mean_and_deviation(values):
    ours = verdicts.measured(values)
    assert ours.values == values and ours.n == len(values)
    assert ours.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-6)
    assert ours.sd == pytest.approx(np.std(values, ddof=1) if len(values) > 1 else 0.0, abs=1e-6)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("id", "message"), [
    ("02.sec4.test_acuracy", "id: unknown '02.sec4.test_acuracy', did you mean '02.sec4.test_accuracy'?"),
    ("01.table3.test_accuracy", "id: '01.table3.test_accuracy' belongs to another chapter than 02_mixed"),
])
def test_unknown_claims_are_refused(id, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        start().claim(id, [0.5])


def test_a_claim_is_given_once():
    record = start()
    record.claim(ACCURACY, [0.5])
    with pytest.raises(ValueError, match="was given before"):
        record.claim(ACCURACY, [0.5])


@pytest.mark.parametrize("values", [[], [[0.1, 0.2]], [math.nan], [0.5, -math.inf], {}, {"clean": [0.5]}, "x"])
def test_values_that_are_no_measurements_are_refused(own_claims, values):
    record = start()
    with pytest.raises(ValueError, match="values: got|could not convert"):
        record.claim("02.number", values)
    with pytest.raises(ValueError, match="values: got|could not convert"):
        record.claim("02.order", {"a": [0.1], "b": values} if not isinstance(values, dict) else {})
    assert record.claims == []


def test_what_a_kind_needs_is_asked_for(own_claims):
    with pytest.raises(ValueError, match="direction: '02.shown' is of kind 'shown', expected True or False"):
        start().claim("02.shown", [0.5])
    with pytest.raises(ValueError, match=re.escape("values: got ['clean'], expected the columns ['clean', 'fgsm']")):
        start().claim("02.columns", {"clean": [0.9]})


def test_the_paper_profile_needs_every_claim(tmp_path):
    for profile in ("smoke", "quick"):
        start(profile).save(tmp_path)
    record = start("paper")
    for id in [id for id in claims() if id[:2] == "02"][:-1]:
        record.claim(id, None, note="left out")
    with pytest.raises(ValueError, match=f"claims: {CHAPTER} lacks {ORDER}"):
        record.save(tmp_path)
    assert not list(tmp_path.rglob("paper.json"))
    record.claim(ORDER, [0.1, 0.2])
    assert record.save(tmp_path).exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, [1.0], {"a": 1}, 1j, object()])
def test_a_table_cell_is_a_plain_value(bad):
    record = start()
    with pytest.raises(ValueError, match="tables"):
        record.table("t", [{"a": bad}])
    assert record.tables == {}


@pytest.mark.parametrize(("x", "series"), [
    ([0, 0.1], {"a": [1.0]}), ([0, 0.1], {"a": [[1.0, 2.0], [1.0]]}), ([0], {"a": []}),
    ([0, 1], {"a": np.empty((0, 2))}), ([0, math.nan], {"a": [1, 2]}), ([0, 1], {"a": [[1, math.inf]]})])
def test_a_curve_has_a_finite_value_for_each_x(x, series):
    record = start()
    with pytest.raises(ValueError):
        record.curve("c", x, series)
    assert record.curves == {}


@pytest.mark.parametrize(("chapter", "profile", "source"), [
    ("mixed", "quick", DATASETS["mnist"]),
    (CHAPTER, "fast", DATASETS["mnist"]),
    (CHAPTER, "quick", DATASETS["mnist"] | {"source": "somewhere"}),
    (CHAPTER, "quick", DATASETS["mnist"] | {"sha256": "abc"}),
    (CHAPTER, "quick", DATASETS["mnist"] | {"n_train": -1}),
    (CHAPTER, "quick", DATASETS["mnist"] | {"n_train": 1.5}),
    (CHAPTER, "quick", DATASETS["mnist"] | {"extra": 1}),
])
def test_a_start_with_wrong_facts_is_refused(chapter, profile, source):
    with pytest.raises(ValueError):
        Record.start(chapter, profile, {"mnist": source})


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def full_record():
    record = start()
    record.claim(ACCURACY, np.float32([0.5, 0.75]), note="fewer images")
    record.claim(ORDER, None, note="not run")
    row = {"name": "plain", "eps": np.float32(0.25), "n": np.int64(3), "deep": np.True_, "no": None}
    record.table("networks", [row])
    record.curve("accuracy", np.float32([0, 0.5]), {"normal": np.array([[1.0, 0.5], [1, 0.25]]), "mixed": [1, 0.75]})
    return record


def test_the_file_follows_the_schema_of_the_design(tmp_path):
    path = full_record().save(tmp_path)
    assert path == tmp_path / "results" / CHAPTER / "quick.json"
    content = json.loads(path.read_text())
    assert list(content) == ["chapter", "profile", "created", "provenance", "claims", "flags", "tables", "curves"]
    assert content["claims"] == [
        {"id": ACCURACY, "ours": {"mean": 0.625, "sd": pytest.approx(0.1767767), "n": 2, "values": [0.5, 0.75]},
         "verdict": "not-reproduced", "note": "fewer images"},
        {"id": ORDER, "ours": None, "verdict": "not-testable", "note": "not run"}]
    row = {"name": "plain", "eps": 0.25, "n": 3, "deep": True, "no": None}
    assert repr(content["tables"]) == repr({"networks": [row]})  # 3 and not 3.0, True and not 1
    assert content["curves"] == {"accuracy": {"x": [0, 0.5], "series": {
        "normal": [[1, 0.5], [1, 0.25]], "mixed": [[1, 0.75]]}}}
    made = content["provenance"]
    assert list(made) == ["commit", "dirty", "helpers", "helpers_sha256", "python", "packages", "device",
                                "cpu_count", "seconds", "units", "processes", "datasets"]
    assert made["datasets"] == DATASETS
    assert set(made["packages"]) == {"numpy", "scipy", "scikit-learn", "scikit-image", "tensorflow", "keras"}
    assert "unknown" not in made["packages"].values()


def test_a_record_survives_the_file(tmp_path):
    record = full_record()
    path = record.save(tmp_path)
    assert Record.load(path) == record
    assert Record.load(path).save(tmp_path / "again").read_text().count("\n") == path.read_text().count("\n")


def test_the_default_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HELPERS_OUTPUT", raising=False)
    assert start().save() == Path("_build/results") / CHAPTER / "quick.json"
    monkeypatch.setenv("HELPERS_OUTPUT", str(tmp_path / "elsewhere"))
    assert start().save() == tmp_path / "elsewhere/results" / CHAPTER / "quick.json"


def test_a_value_spoiled_after_it_was_added_does_not_reach_the_file(tmp_path):
    record = full_record()
    old = record.save(tmp_path).read_text()
    record.curves["accuracy"].series["mixed"][0][0] = math.nan
    with pytest.raises(ValueError, match="finite"):
        record.save(tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == [old]


def test_a_failed_write_leaves_the_older_record(tmp_path, monkeypatch):
    record = full_record()
    old = record.save(tmp_path).read_text()

    def full_disk(path, text, **options):
        with open(path, "w") as file:
            file.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="cannot write .*quick.json: No space left on device"):
        record.save(tmp_path)
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == [old]


def test_the_seconds_count_from_the_start_and_those_of_finished_units(tmp_path, monkeypatch):
    record = start()
    record.created = "2026-01-01T00:00:00Z"
    assert Record.load(record.save(tmp_path)).provenance.seconds > 3600
    assert Record.load(start().save(tmp_path)).provenance.seconds < 60
    monkeypatch.setattr(records, "earlier_seconds", lambda: 3600.0)
    monkeypatch.setattr(records, "taken", lambda: {"attack": [2.0, 1.5]})
    run = Record.load(start().save(tmp_path)).provenance
    assert 3600 <= run.seconds < 3660 and run.units == {"attack": [2.0, 1.5]}


@pytest.mark.parametrize("spoil", [
    lambda content: content.update(extra=1),
    lambda content: content.pop("provenance"),
    lambda content: content["claims"][0].update(verdict="confirmed"),
    lambda content: content["claims"][0]["ours"].update(mean=math.nan),
    lambda content: content["claims"][0]["ours"].update(mean="0.5"),
    lambda content: content["claims"][0]["ours"].update(median=0.5),
    lambda content: content["provenance"].update(user="somebody"),
    lambda content: content["provenance"].update(seconds=math.inf),
    lambda content: content.update(created="2026-01-01 10:00"),
    lambda content: content["tables"]["networks"][0].update(eps=math.nan),
    lambda content: content["curves"]["accuracy"]["x"].append(1.0),
])
def test_a_file_outside_the_schema_is_refused(tmp_path, spoil):
    path = full_record().save(tmp_path)
    content = json.loads(path.read_text())
    spoil(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError):
        Record.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = full_record().save(tmp_path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match="JSON"):
        Record.load(path)


# ── flags ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [flags.flag("accuracy", 0.9, 0.95, ">=", 50, 0.8, 0.94), flags.flag("twice the steps", 0.0, 0.01, "<=", 50)]


def test_a_raised_flag_marks_the_claims_that_hang_on_it():
    record = start("paper")
    shown = record.flag("mixed-batch", ROWS, spoils=["02.sec4"])
    assert list(shown.columns) == list(ROWS[0]) and len(shown) == 2
    assert [flag.name for flag in record.raised()] == ["mixed-batch: accuracy"]
    assert record.raised(ACCURACY) == record.raised() and not record.raised(ORDER)
    record.flag("normal", pd.DataFrame(ROWS[:1]))
    assert len(record.raised(ACCURACY)) == 2 and len(record.raised(ORDER)) == 1
    record.claim(ORDER, [0.1, 0.1], "our note")
    mark = "NOT SOUND: normal: accuracy is 0.9 (0.8 to 0.94), expected at least 0.95, n = 50"
    assert list(record.comparison()["Note"]) == [f"{mark}; our note"]


def test_a_flag_hangs_on_claims_however_they_are_listed():
    record = start("paper")
    record.flag("normal", ROWS, spoils=(start for start in ["02.sec4"]))
    assert [flag.spoils for flag in record.flags] == [["02.sec4"]] * 2


def test_a_flag_that_passes_by_its_interval_alone_is_counted():
    record = start("paper")
    record.flag("normal", [flags.flag("accuracy", 0.9, 0.85, ">=", 50, 0.8, 0.94)])
    record.flag("mixed-batch", [flags.flag("accuracy", 0.9, 0.92, ">=", 50, 0.8, 0.94)])
    assert [flag.limit for flag in record.beyond()] == [0.92]


def test_a_flag_beyond_the_paper_marks_the_run_and_no_claim():
    record = start("paper")
    record.flag("our attack", ROWS, spoils=["02.beyond"])
    assert len(record.raised()) == 1 and not record.raised(ACCURACY) and not record.raised(ORDER)


def test_flags_are_kept_and_smoke_judges_nothing(tmp_path):
    record = start("smoke")
    assert record.flags is None  # not the same as: all conditions were met
    record.flag("mixed-batch", ROWS)
    back = Record.load(record.save(tmp_path))
    assert back.flags == record.flags and [flag.passed for flag in back.flags] == [False, True]
    assert not back.raised() and not back.raised(ACCURACY)


@pytest.mark.parametrize(("rows", "spoils", "message"), [
    (ROWS, ["03.table1"], "spoils: no claim of 02_mixed.* begins with '03.table1'"),
    (ROWS, ["03.beyond"], "spoils: no claim of 02_mixed.* begins with '03.beyond'"),
    (ROWS, ["02.tabel1"], "spoils: no claim of 02_mixed.* begins with '02.tabel1'"),
    ([*ROWS, ROWS[0]], [], "rows: 'x: accuracy' was flagged before"),
    ([ROWS[0] | {"measured": math.nan}], [], "measured"),
    ([ROWS[0] | {"surplus": 1}], [], "surplus"),
])
def test_bad_flags_are_refused(rows, spoils, message):
    record = start()
    with pytest.raises(ValueError, match=message):
        record.flag("x", rows, spoils)
    assert record.flags is None


# ── paper and ours ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_comparison_shows_the_paper_beside_ours(own_claims):
    record = start()
    record.claim("02.number", [0.9851, 0.9852, 0.9853], note="fewer <images>")
    record.claim("02.columns", {"fgsm": [0.5], "clean": [0.91234]})
    record.claim("02.order", None, note="x" * 80)
    record.claim("02.choice", [0.01, 1.0, 1.0], note="two of them")
    record.claim("02.shown", {"nr": [0.4], "dnr": [0.5]}, direction=True)
    frame = record.comparison()
    assert list(frame.columns) == ["Claim", "What", "Paper", "Ours", "Verdict", "Note"]
    assert frame.to_numpy().tolist() == [
        ["02.number", "something", "0.9892", "0.9852 ± 0.0001 (n = 3)", "reproduced",
         "off by 0.004, tolerance 0.004; fewer <images>"],
        ["02.columns", "something: clean", "0.9", "0.9123 (n = 1)", "reproduced", "off by 0.0123, tolerance 0.05"],
        ["", "fgsm", "0.5", "0.5 (n = 1)", "", "off by 0, tolerance 0.05"],
        ["02.order", "something", "–", "–", "not-testable", "x" * 80],
        ["02.choice", "something", "0.1", "0.01 or 1 (n = 3)", "not-reproduced", "two of them"],
        ["02.shown", "something: nr", "–", "0.4 (n = 1)", "reproduced", ""],
        ["", "dnr", "–", "0.5 (n = 1)", "", ""]]


def test_what_the_columns_of_a_claim_share_stands_once(own_claims):
    record = start()
    record.claim("02.shown", {"nr": [0.4], "dnr": [0.5]}, "as in a figure", direction=True)
    full = [["02.shown", f"something: {part}", "–", f"{value} (n = 1)", "reproduced", "as in a figure"]
            for part, value in (("nr", 0.4), ("dnr", 0.5))]
    assert record.comparison(repeat=True).to_numpy().tolist() == full
    assert record.comparison().to_numpy().tolist() == [full[0], ["", "dnr", "–", "0.5 (n = 1)", "", ""]]


def test_a_note_is_left_out_only_below_the_same_one(own_claims, monkeypatch):
    record, rows = start(), [["02.x", f"w: {part}", "", "", "", note] for part, note in zip("abc", "pqp", strict=True)]
    monkeypatch.setattr(records, "compare", lambda *_: pd.DataFrame(
        rows, columns=["Claim", "What", "Paper", "Ours", "Verdict", "Note"]))
    monkeypatch.setattr(records, "claims", lambda: {"02.x": type("Claim", (), {"what": "w"})})
    assert list(record.comparison()["Note"]) == ["p", "q", "p"]


def test_a_claim_without_a_record_has_rows_too():
    frame = compare(dict.fromkeys(claims()))
    assert set(frame["Claim"]) == set(claims()) and set(frame["Verdict"]) == {"no record yet"}
    table = frame[frame["Claim"] == "05.table1.ct.pretrained"]
    assert list(table["Paper"]) == ["1", "0.8612", "1", "1"]
    assert table["What"].iloc[0] == "Table I, eps = 0.004: clean"
    assert list(start().comparison().columns) == ["Claim", "What", "Paper", "Ours", "Verdict", "Note"]


# ── where the numbers come from ───────────────────────────────────────────────────────────────────────────────────────


def test_the_hash_of_the_helpers_is_what_sha256sum_prints():
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
             for path in sorted(Path(records.__file__).parent.glob("*.py")) if path.stem not in NO_COMPUTE]
    assert len(lines) > 10 and not any("cli.py" in line for line in lines)  # a page is not older for a new command
    assert provenance.helpers_sha256() == hashlib.sha256("".join(lines).encode()).hexdigest()
    two = [line for line in lines if line.split()[1] in ("checks.py", "flags.py")]
    assert provenance.helpers_sha256(["flags", "checks"]) == hashlib.sha256("".join(two).encode()).hexdigest()


def test_a_record_names_the_helpers_that_its_chapter_had_loaded():
    about = start().provenance
    assert {"checks", "flags"} <= set(about.helpers) and not NO_COMPUTE & set(about.helpers)
    assert about.helpers_sha256 == provenance.helpers_sha256(about.helpers)
    script = "from helpers import flags, records; print(*records.Record.start('00_x', 'smoke', {}).provenance.helpers)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["checks", "flags"]  # a change of another one does not make its page older


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with the layout of this one, whose package is the one that runs."""
    for folder in ("src/helpers", "book", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "src/helpers/a.py").write_text("a = 1\n")
    (tmp_path / "README.md").write_text("first\n")
    shutil.copy(ROOT / "book/claims.yml", tmp_path / "book")
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "src/helpers")
    return tmp_path


def git(folder, *arguments):
    options = ("user.name=a", "user.email=a@b.c", "commit.gpgsign=false", "core.hooksPath=/dev/null")
    command = ["git", *itertools.chain(*(("-c", option) for option in options)), *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_and_whether_the_code_differs_from_it(checkout):
    git(checkout, "init")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "first")
    about = start().provenance
    assert (about.commit, about.dirty) == (git(checkout, "rev-parse", "HEAD"), False)
    (checkout / "README.md").write_text("changed\n")  # decides no number
    assert start().provenance.dirty is False
    (checkout / "src/helpers/b.py").write_text("b = 1\n")
    assert start().provenance.dirty is True


def test_outside_a_repository_the_version_stands_in(checkout, monkeypatch):
    expected = (f"v{helpers.__version__}", None)
    assert provenance.revision() == expected  # a checkout's layout, but no repository
    git(checkout, "init")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert provenance.revision() == expected  # no git
    monkeypatch.undo()
    (checkout / "book/claims.yml").unlink()
    monkeypatch.setattr(provenance, "_PACKAGE", checkout / "src/helpers")
    assert provenance.revision() == expected  # installed inside somebody else's repository


def test_the_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert start().provenance.cpu_count == 1


def test_the_device_is_the_gpu_where_tensorflow_sees_one(tmp_path, monkeypatch):
    config = SimpleNamespace(list_physical_devices=lambda kind: [SimpleNamespace(name="/gpu:0")],
                             experimental=SimpleNamespace(get_device_details=lambda gpu: {"device_name": "Tesla T4"}))
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(config=config))
    assert start().provenance.device == "Tesla T4"
    monkeypatch.delitem(sys.modules, "tensorflow")
    record = start()
    assert record.provenance.device not in ("", "Tesla T4")
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace(config=config))  # imported after the start
    assert Record.load(record.save(tmp_path)).provenance.device == "Tesla T4"


def test_a_record_does_not_load_tensorflow():
    code = f"import sys, helpers.records as r; r.Record.start({CHAPTER!r}, 'smoke', {{}}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "helpers.records" in loaded and "tensorflow" not in loaded and "keras" not in loaded


# ── the committed records ─────────────────────────────────────────────────────────────────────────────────────────────


def test_committed_verdicts_follow_from_their_values():
    for path in sorted(ROOT.glob("book/results/*/*.json")):
        found = Record.load(path).judged_again()
        assert (found.chapter, found.profile) == (path.parent.name, path.stem)
        for outcome in found.claims:
            check_verdict(found, outcome)


def check_verdict(record, outcome):
    ours = outcome.ours
    values = {part: one.values for part, one in ours.items()} if isinstance(ours, dict) else ours and ours.values
    possible = set()
    for direction, tie in itertools.product((True, False), (True, False)):  # what the chapter said is not in the record
        again = Record.start(record.chapter, record.profile, {})
        possible.add(again.claim(outcome.id, values, outcome.note, direction, tie))
        assert again.claims[0].ours == ours, f"{outcome.id}: mean, sd or n is not that of the values"
    assert outcome.verdict in possible, outcome.id


def test_a_typed_verdict_would_be_noticed(own_claims):
    for profile in ("quick", "smoke"):
        record = start(profile)
        record.claim("02.number", [0.5])
        record.claim("02.order", [0.5, 0.5])
        for outcome in record.claims:
            check_verdict(record, outcome)
            wrong = "direction" if outcome.verdict == "reproduced" else "reproduced"
            for change in ({"verdict": wrong}, {"ours": outcome.ours.model_copy(update={"mean": 0.9892})}):
                with pytest.raises(AssertionError):
                    check_verdict(record, outcome.model_copy(update=change))
