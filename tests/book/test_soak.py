"""The soak: what a first part of it covers, what it counts, and that it goes on where it stopped."""

import json
import os
import subprocess
import sys
from itertools import islice, product

from conftest import RECORD, ROOT
from soak import ONEDNN, plan


def test_a_first_part_covers_everything_and_no_variant_comes_twice():
    chapters, pythons = ["01", "02", "03"], ["3.11", "3.13"]
    start = list(islice(plan(chapters, pythons, quick=True), 3 * 12))
    for place, values in enumerate((chapters, ["smoke", "quick"], None, [1, 2], ONEDNN, pythons)):
        for chapter in chapters:
            found = {variant[place] for variant in start if variant[0] == chapter}
            assert place == 0 or found == set(values or found) and len(found) > 1
    every = [variant[:1] + variant[2:5] for variant in islice(plan(chapters, pythons, quick=True), 3 * 80)]
    assert set(every) == set(product(chapters, range(10), (1, 2), ONEDNN)) and len(every) == 3 * 80


def test_a_soak_names_what_is_red_and_goes_on_where_it_stopped(tiny):
    book = tiny("import os\nassert os.environ.get('ONEDNN_MAX_CPU_ISA') != 'SSE41', f'{SEED}'", RECORD)

    def soak(runs):
        command = [sys.executable, ROOT / "tests/soak.py", "--runs", str(runs), "--this-python"]
        return subprocess.run(command, cwd=book.root,
                              env=os.environ | {"HELPERS_OUTPUT": str(book.output), "HELPERS_DATA": ""},
                              capture_output=True, text=True)

    first, second = soak(2), soak(4)
    assert first.returncode == 0 and "2 runs, 0 red" in first.stdout, first.stderr
    assert second.returncode == 1 and second.stdout.count("of 4: ") == 2
    assert second.stdout.endswith("AssertionError: 7\n\n4 runs, 1 red\n"), second.stdout
    lines = [json.loads(line) for line in (book.output / "soak.jsonl").read_text().splitlines()]
    assert [line["onednn"] for line in lines if line["error"]] == ["SSE41"] and len(lines) == 4
    assert not [*(book.output / "soak").iterdir()]
    tiny("import os", RECORD)
    assert "0 runs, 0 red" not in (done := soak(1)).stdout and "1 runs, 0 red" in done.stdout
