"""What the benchmarks write; their numbers are no matter of a test."""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from helpers import data

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from common import report  # noqa: E402 - a script's neighbour, not a package


def test_each_subject_keeps_its_last_run_in_one_file(tmp_path, capsys):
    options, digits = argparse.Namespace(steps=20, output=tmp_path), data.load("digits").take(n_test=10)
    for subject, seconds in [("attacks", 1.5), ("detection", 2.5), ("attacks", 3.5)]:
        report(subject, options, digits, {"rate": pd.DataFrame({"seconds": {"ours": seconds}})}, peer="1.0")
    assert "3.5" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert path.name == "bench.json" and list(content) == ["attacks", "detection"]
    assert content["attacks"]["rate"] == {"ours": {"seconds": 3.5}} and content["attacks"]["settings"] == {"steps": 20}
    assert content["detection"]["rate"] == {"ours": {"seconds": 2.5}}
    assert content["detection"]["provenance"]["peer"] == "1.0"
