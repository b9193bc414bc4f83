"""What the pages show: the right run, its facts, figures with their text, and nothing of the machine."""

import base64
import json
import re
import shutil
import subprocess
from html import unescape

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import FIGURE, RECORD, ROOT, command, commit
from nbformat.v4 import new_output
from PIL import Image

from helpers import board, flags
from helpers.book import Book, BookError
from helpers.execution import execute
from helpers.records import Record
from helpers.site import MAX_BYTES, build, errata, ledger, publish, stage, what_is_left
from helpers.verdicts import claims


def page(book, chapter="02_tiny"):
    """The staged page of a chapter."""
    stage(book)
    return nbformat.read(book.output / f"stage/notebooks/{chapter}.ipynb", 4)


def text(notebook):
    """Everything in a notebook as one string."""
    return nbformat.writes(notebook)


def test_what_each_choice_shows(tiny):
    book = tiny(RECORD)
    choices = {show: Book(book.root, book.output, show=show) for show in ("committed", "auto", "run")}
    assert all("**Not run yet.**" in page(choice).cells[1].source for choice in choices.values())
    execute(book, book.chapters())
    profiles = [re.findall(r"\*\*Profile shown: (\w+)", text(page(choice))) for choice in choices.values()]
    assert profiles == [[], ["smoke"], ["smoke"]]
    commit(book)
    profiles = [re.findall(r"\*\*Profile shown: (\w+)", text(page(choice))) for choice in choices.values()]
    assert profiles == [["paper"], ["paper"], ["smoke"]]
    assert ["the paper run" in text(page(choice)) for choice in choices.values()] == [True, True, False]
    assert not any("warning" in page(choice).cells[1].source for choice in choices.values())
    assert "| yes |" in (book.output / "stage/book/status.md").read_text()


def test_a_copy_with_other_code_is_shown_as_it_is_and_says_so_everywhere(tiny):
    book = tiny(RECORD)
    commit(book)
    tiny(RECORD + "\nprint('new')")
    source, sentence = book.source("02_tiny"), "The notebook's code has changed since this run."
    source.cells[0].source = "# Better title"
    nbformat.write(source, book.root / "notebooks/02_tiny.ipynb")
    shown = page(book)
    assert shown.cells[0].source == "# Tiny chapter" and shown.cells[-1].source == RECORD
    assert shown.cells[-1].outputs[0].text == "the paper run"
    assert shown.cells[1].source.startswith(f":::{{warning}}\n{sentence}\n:::\n")
    assert "**Profile shown: paper.**" in shown.cells[1].source
    assert "Its code has changed since" in (book.output / "stage/book/ledger.md").read_text()
    assert f"| {sentence} |" in unescape((book.output / "stage/book/status.md").read_text())
    build(book)


def test_a_copy_with_other_code_keeps_its_folds_and_no_other_metadata(tiny):
    book = tiny(RECORD)
    commit(book)
    executed = book.committed("02_tiny")[0]
    ran = nbformat.read(executed, 4)
    ran.cells[-1].metadata.update(tags=["hide-input"], papermill={"duration": 1.0})
    nbformat.write(ran, executed)
    tiny(RECORD + "\nprint('new')")
    assert page(book).cells[-1].metadata == {"tags": ["hide-input"]}


def test_numbers_of_other_helpers_are_shown_and_said_to_be_so_everywhere(tiny, monkeypatch):
    book, sentence = tiny(RECORD), "Its numbers were computed with earlier helpers."
    commit(book)
    assert sentence not in text(page(book))
    monkeypatch.setattr("helpers.book.helpers_sha256", lambda names: 64 * "0")
    assert "the paper run" in text(page(book)) and f"\n{sentence}\n" in page(book).cells[1].source
    assert "Its code has changed since" in (book.output / "stage/book/ledger.md").read_text()
    assert f"| {sentence} |" in unescape((book.output / "stage/book/status.md").read_text())


def test_the_status_page_plans_a_paper_run_from_what_the_units_of_the_kept_one_took(tiny):
    book, status = tiny(RECORD), "stage/book/status.md"
    commit(book)
    stage(book)
    assert "What a paper run of a chapter takes" not in (book.output / status).read_text(), "a record from before"
    path = book.committed("02_tiny")[1]
    content = json.loads(path.read_text())
    content["provenance"] |= {"units": {"train": [3600.0, 1800.0], "attack": 8 * [1800.0]}, "seconds": 10000.0,
                              "cpu_count": 2}
    path.write_text(json.dumps(content))
    stage(book)  # the units alone took 10,800 seconds on two cores
    assert "| 10 | 60.0 | 5.5 | 1.5 | 1.5 |" in (book.output / status).read_text()
    content["provenance"]["seconds"] = 12600.0
    path.write_text(json.dumps(content))
    stage(book)
    assert "| 10 | 60.0 | 6.0 | 2.0 | 2.0 |" in (book.output / status).read_text(), "half an hour outside of units"


def test_a_failed_chapter_is_named_shows_its_committed_copy_and_the_others_are_rendered(tiny):
    book = tiny("raise ValueError('``` <b>not bold</b> *nor this*\\n:::::\\n\\n# no heading {cite}`none`\\x1b[31m ε')")
    commit(book)
    tiny(RECORD.replace("02", "04").replace("sec4.train_accuracy", "sec51.mnist_accuracy"), name="04_tiny")
    done = command("book", "--show", "run", cwd=book.root, HELPERS_OUTPUT=str(book.output))
    assert done.returncode == 1 and "02_tiny, profile smoke: cell 3 `raise Val" in done.stderr
    assert "Traceback" not in done.stderr and f"The book is at {book.output / 'html/index.html'}" in done.stdout
    for _ in range(2):
        failed, fine, status = ((book.output / f"html/{page}.html").read_text() for page in (
            "notebooks/02_tiny", "notebooks/04_tiny", "book/status"))
        said = "``` &lt;b&gt;not bold&lt;/b&gt; *nor this*\n:::::\n\n# no heading {cite}`none` ε\n</pre>"
        assert said in failed and "failed, on" in failed
        assert "Profile shown: paper" in failed and "the paper run" in failed
        assert " failed, on" not in fine
        assert re.search(r"<td>failed</td><td>cell 3 `raise .*&lt;b&gt;not bold", status)
        done = command("site", cwd=book.root, HELPERS_OUTPUT=str(book.output))
        assert done.returncode == 0, done.stderr


def test_new_prose_does_not_make_a_copy_stale(tiny):
    book = tiny(RECORD)
    commit(book)
    source = book.source("02_tiny")
    source.cells[0].source = "# Better title"
    nbformat.write(source, book.root / "notebooks/02_tiny.ipynb")
    assert "the paper run" in text(page(book)) and page(book).cells[0].source == "# Better title"
    assert "Its code has changed since" not in (book.output / "stage/book/ledger.md").read_text()


def test_the_card_states_the_facts_of_the_record(tiny):
    book = tiny(RECORD)
    execute(book, book.chapters())
    record = commit(book)
    card = page(book).cells[1].source
    about = record.provenance
    assert f"Run on {record.created[:10]} in 67 min on {about.device} ({about.cpu_count} cores)" in card
    assert "`1 reproduced`" in card and re.search(r"Run times: smoke \d+ s, paper 67 min\.", card)
    assert "not-testable" not in card
    assert "title     = {Tiny chapter}," in card
    assert f"paper run of {record.created[:10]}, commit {about.commit[:10]}}}" in card
    downloads = book.output / "stage/book/downloads"
    assert Record.load(downloads / "02_tiny.json") == record
    assert list(pd.read_csv(downloads / "02_tiny.csv")["Claim"]) == ["02.sec4.test_accuracy"]
    assert "the paper run" in (downloads / "02_tiny.ipynb").read_text()


FLAG = """record.flag("network", [flags.flag("accuracy", 0.9, 0.95, ">=", 50, 0.8, 0.94)])
record.save()"""


def test_a_raised_flag_is_on_the_card_and_in_the_ledger_with_its_explanation(tiny):
    book = tiny(RECORD)
    record = commit(book)
    assert "from before its checks were recorded" in page(book).cells[1].source
    assert set(ledger(book).query("Verdict == 'reproduced'")["Sound"]) == {"not recorded"}
    kept = book.committed("02_tiny")[1]
    for passed, mark in ((True, "-success}`sound` None of 1 conditions"), (False, "{bdg-danger}`not sound` 1 of 1")):
        row = flags.flag("accuracy", 0.9, 0.85 if passed else 0.95, ">=", 50, 0.8, 0.94)
        fresh = Record.model_validate(record.model_dump())
        fresh.flag("network", [row])
        kept.write_text(fresh.model_dump_json())
        assert mark in page(book).cells[1].source
        assert set(ledger(book).query("Verdict == 'reproduced'")["Sound"]) == {"yes" if passed else "no"}
    (book.root / "book/flags.yml").write_text("02_tiny:\n  'network: accuracy': Its last layer was cut off.\n")
    card, listed = page(book).cells[1].source, (book.output / "stage/book/ledger.md").read_text()
    said = "network: accuracy is 0.9 (0.8 to 0.94), expected at least 0.95, n = 50"
    assert f"- {said}. Its last layer was cut off." in card
    assert "not sound</strong>" in listed and f"NOT SOUND: {said}" in listed
    build(book)


def test_a_raised_flag_that_no_sentence_explains_is_not_published(tiny):
    chapter = RECORD.replace("record.save()", FLAG).replace("import Record", "import Record\nfrom helpers import flags")
    book = tiny(chapter, profile="quick")
    execute(book, book.chapters())
    with pytest.raises(BookError, match="(?s)no sentence explains.*network: accuracy is 0.9 .*book/flags.yml"):
        publish(book, "02_tiny")
    assert not any(kept.exists() for kept in book.committed("02_tiny"))
    (book.root / "book/flags.yml").write_text("02_tiny:\n  'network: accuracy': Its last layer was cut off.\n")
    publish(book, "02_tiny")
    assert all(kept.exists() for kept in book.committed("02_tiny"))


def test_errata_are_about_one_run_and_stand_above_its_card(tiny):
    book = tiny(RECORD)
    record, path = commit(book), book.root / "book/errata.yml"
    assert errata(book, "02_tiny") == [] and "Errata" not in page(book).cells[1].source
    for run in (record.provenance.commit[:10], "0123456789"):
        path.write_text(f"02_tiny:\n  run: '{run}'\n  wrong: [It was *measured* twice., At `n = 0`.]\n")
        if record.provenance.commit.startswith(run):
            assert page(book).cells[1].source.startswith(
                ":::{admonition} Errata of this run: do not quote these\n:class: danger\n- It was *measured* "
                "twice.\n- At `n = 0`.\n:::\n")
            assert "**2 errata**, at the top of the chapter" in (book.output / "stage/book/ledger.md").read_text()
            build(book)
            execute(book, book.chapters())
            assert "Errata" not in page(Book(book.root, book.output, show="run")).cells[1].source
        else:
            with pytest.raises(BookError, match="errata.yml: 02_tiny.*of commit 0123456789"):
                stage(book)


def test_errata_withdraw_the_verdicts_that_fall_with_them(tiny):
    book = tiny(RECORD)
    record, path = commit(book), book.root / "book/errata.yml"
    (outcome, *_) = record.claims
    entry = "02_tiny:\n  run: '{}'\n  withdrawn: [{}]\n  wrong: [It was measured twice.]\n"
    for run, withdrawn in ((record.provenance.commit[:10], True), ("0123456789", False)):  # of another run: no matter
        path.write_text(entry.format(run, outcome.id[:6]))
        frame = ledger(book).set_index("Claim").loc[[outcome.id]]
        assert (frame["Verdict"] == ("withdrawn" if withdrawn else outcome.verdict)).all()
        assert frame["Note"].str.startswith(f"{outcome.verdict} by this run").all() == withdrawn
        if withdrawn:
            assert "withdrawn`" in page(book).cells[1].source
    path.write_text(entry.format(record.provenance.commit[:10], "02.sec9"))
    with pytest.raises(BookError, match="errata.yml: 02_tiny withdraws '02.sec9', with which no claim begins"):
        errata(book, "02_tiny")


def test_a_paper_run_of_code_that_is_not_committed_is_refused_before_it_computes(tiny):
    book = tiny(RECORD)
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org", "-C", str(book.root)]
    for rest in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *rest], check=True)
    (book.root / "notebooks/02_tiny.ipynb").write_text("{}")
    done = command("paper", cwd=book.root, HELPERS_OUTPUT=str(book.output))
    assert done.returncode == 1
    assert done.stderr.startswith("Error: src, notebooks or book/claims.yml are not as committed")
    assert not book.run("02_tiny", "paper")[0].exists()


def test_a_chapter_that_was_not_run_is_not_published(tiny):
    with pytest.raises(BookError, match="02_tiny: there is no run"):
        publish(tiny(RECORD, profile="quick"), "02_tiny")


def test_injected_cells_logs_and_paths_of_the_machine_are_not_shown(tiny):
    noise = "import os, sys, warnings\nprint(os.getcwd(), sys.prefix + '/bin', os.environ['HELPERS_OUTPUT'] + '/x')"
    book = tiny(RECORD, noise + "\nwarnings.warn('careful')\nos.write(2, b'low level');")
    execute(book, book.chapters())
    shown = page(book)
    assert [cell.source for cell in shown.cells if cell.cell_type == "code"][0] == 'PROFILE = "quick"'
    assert "Parameters" not in text(shown)
    (output,) = shown.cells[-1].outputs
    assert output.text == "notebooks bin x\n"
    executed = book.run("02_tiny")[0]
    assert "careful" in executed.read_text() and "low level" in executed.with_suffix(".log").read_text()


def test_a_figure_gets_its_text_number_and_caption(tiny):
    book = tiny(RECORD, FIGURE)
    execute(book, book.chapters())
    stage(book)
    build(book)
    html = (book.output / "html/notebooks/02_tiny.html").read_text()
    (image,) = re.findall(r"<img [^>]*02_tiny-c1\.[^>]*>", html)
    assert 'alt="It falls: from &quot;0.9&quot; to 0.1 # really"' in image
    assert re.search(r'<figure[^>]* id="fig-02-c1">.*?Fig\. 1 .*?A <strong>caption</strong>\.', html, re.DOTALL)
    assert html.index("A <strong>caption") < html.index("<p>Text after the figure.")
    picture = base64.b64decode(re.search(r'pixel = "(.*)"', FIGURE).group(1))
    assert (book.output / "stage/notebooks/02_tiny-c1.png").read_bytes() == picture
    assert ":width: 1px" in (book.output / "stage/notebooks/02_tiny.ipynb").read_text()  # of a picture that is as wide
    clean = (book.output / "html/_sources/notebooks/02_tiny.ipynb").read_text()
    assert "image/png" in clean and "chapter-card" not in clean


@pytest.mark.parametrize(("tags", "folds"), [
    ([], ["a = 1", "b = 2\n\n\nprint(a + b)"]), (["hide-input"], ["a = 1", "b = 2\n\n\nprint(a + b)"]),
    (["hide-input", "remove-output"], ["a = 1\n\n\nb = 2\n\n\nprint(a + b)"])])
def test_hidden_code_that_shows_nothing_is_in_the_fold_of_what_follows(tiny, tags, folds):
    book = tiny(RECORD, "a = 1", "b = 2", "print(a + b)")
    commit(book)
    executed, source = book.committed("02_tiny")[0], book.source("02_tiny")
    for cell, each in zip(source.cells[-3:], [tags, ["hide-input"], ["hide-input"]], strict=True):
        cell.metadata["tags"] = each
    nbformat.write(source, book.root / "notebooks/02_tiny.ipynb")
    ran = nbformat.read(executed, 4)
    ran.cells[-3].outputs = [new_output("stream", name="stdout", text="progress")]
    nbformat.write(ran, executed)
    shown = page(book)
    assert [cell.source for cell in shown.cells[-len(folds) - 1:]] == [RECORD, *folds]
    assert shown.cells[-1].outputs[0].text == "the paper run"
    assert ("progress" in text(shown)) == ("remove-output" not in tags)
    copy = nbformat.read(book.output / "stage/book/downloads/02_tiny.ipynb", 4)
    assert [cell.source for cell in copy.cells[-3:]] == ["a = 1", "b = 2", "print(a + b)"]


def test_a_cover_stands_under_the_title_before_any_code_and_where_it_is_computed(tiny):
    book = tiny(RECORD, FIGURE.replace('"caption":', '"cover": True, "caption":'), FIGURE)
    execute(book, book.chapters())
    stage(book)
    build(book)
    html = (book.output / "html/notebooks/02_tiny.html").read_text()
    cover, computed, other = (match.start() for match in re.finditer(r"<figure[^>]*>", html))
    title, card, code = map(html.index, ("Tiny chapter</h1>", "chapter-card", "cell_input"))
    order = [title, cover, card, code, computed, other]
    assert order == sorted(order)
    assert 'href="#fig-02-c1"' in html[cover:computed] and "Fig. 2" in html[computed:other]
    assert html.count('alt="It falls: from &quot;0.9&quot; to 0.1 # really"') == 3


def test_the_ledger_holds_every_claim_once_and_says_where_there_is_no_record(tiny):
    book = tiny(RECORD)
    commit(book)
    frame, known = ledger(book), claims(ROOT / "book/claims.yml")
    assert list(frame["Claim"].drop_duplicates()) == list(known)
    found = frame.set_index("Claim").loc["02.sec4.test_accuracy"]
    assert (found["Verdict"], found["Paper"]) == ("reproduced", "0.9892")
    assert found["Note"] == "off by 3.33e-05, tolerance 0.004; as printed"
    assert "0.9892 ±" in found["Ours"] and "n = 3" in found["Ours"]
    assert set(frame[frame["Claim"] != "02.sec4.test_accuracy"]["Verdict"]) == {"no record yet"}
    several = frame.set_index("Claim").loc["05.table1.ct.pretrained"]  # a row for each column of the paper
    assert list(several["Paper"]) == ["1", "0.8612", "1", "1"]


def test_a_paper_that_is_not_listed_is_named(tiny):
    book = tiny(RECORD)
    path = book.root / "book/claims.yml"
    path.write_text(re.sub(r'\n  "0[25]":.*', "", path.read_text()))
    with pytest.raises(BookError, match="book/claims.yml: under papers, no entry for 02, 05$"):
        ledger(book)


def test_every_number_of_the_ledger_is_in_a_committed_record_and_its_section_in_a_chapter(tmp_path):
    book = Book(ROOT, tmp_path)
    frame, known = ledger(book), claims()
    assert set(frame["Claim"]) == set(known)
    kept = {record.chapter[:2]: record.judged_again()
            for record in map(Record.load, ROOT.glob("book/results/*/paper.json"))}
    assert kept
    for row in frame.to_dict("records"):
        record = kept.get(row["Claim"][:2])
        entry = next((entry for entry in record.claims if entry.id == row["Claim"]), None) if record else None
        if entry is None:
            assert (row["Ours"], row["Verdict"], row["Run"]) == ("–", "no record yet", "")
            assert record is None or book.changed(*book.committed(record.chapter))
            continue
        ours = entry.ours.values() if isinstance(entry.ours, dict) else [entry.ours]
        if known[row["Claim"]].kind == "choice" and entry.ours:  # not a mean: what was chosen
            ours = [f"{' or '.join(f'{value:g}' for value in dict.fromkeys(ours[0].values))} (n = {ours[0].n})"]
        assert row["Ours"] in [str(value or "–") for value in ours]
        withdrawn = row["Verdict"] == "withdrawn"
        assert withdrawn or row["Verdict"] == entry.verdict
        assert not withdrawn or errata(book, record.chapter)
        assert row["Run"][:10] == record.created[:10] and row["Note"] and row["Note"].endswith(entry.note)
        if not withdrawn and known[row["Claim"]].kind == "number":
            assert re.match(rf"off by [\d.e-]+.*, tolerance {known[row['Claim']].tolerance:g}\b", row["Note"])
    for chapter in book.chapters():
        text = [cell.source for cell in book.source(chapter).cells if cell.cell_type == "markdown"]
        headings = {line.lstrip("# ") for source in text for line in source.splitlines() if line.startswith("#")}
        assert {claim.section for claim in known.values() if claim.id[:2] == chapter[:2]} <= headings


def test_what_is_left_is_read_from_the_records_and_less_than_the_weak_attack_leaves(tmp_path):
    """The second half is what the figure's alternative text on the index says."""
    book = Book(ROOT, tmp_path)
    rows = what_is_left(book)
    assert {row["chapter"] for row in rows} == set(book.chapters()) - {"06_arena"}  # which has a board of its own
    for row in rows:
        executed, path = book.committed(row["chapter"])
        if not path.exists() or not row["weak"]["shares"] or not row["informed"]["shares"]:
            assert not path.exists() or book.changed(executed, path)
            continue
        curves = Record.load(path).curves
        for end in (row["weak"], row["informed"]):
            assert all(0 <= share <= 1 for share in end["shares"])
            at = int(np.argmin(np.abs(np.array(curves[end["curve"]].x) - row["eps"])))
            values = np.array(curves[end["curve"]].series[end["series"]])[:, at]
            np.testing.assert_allclose(end["shares"], 1 - values if end.get("beaten") else values)
        assert np.mean(row["informed"]["shares"]) < np.mean(row["weak"]["shares"])


def test_the_index_says_what_its_first_figure_finds(tmp_path):
    book = Book(ROOT, tmp_path)
    stage(book)
    verdicts = dict.fromkeys(
        ["reproduced", "undecided", "direction", "not-reproduced", "not-testable", "withdrawn",
         "no record yet"], 0)
    verdicts |= ledger(book).drop_duplicates("Claim")["Verdict"].value_counts()
    text = (tmp_path / "stage/book/index.md").read_text()
    (found,) = re.findall(r"at-a-glance\.png\n:alt: (.*)\n:name: ", text)
    assert [int(number) for number in re.findall(r"\d+", found)] == [sum(verdicts.values()), *verdicts.values()]
    drawn, kept = (json.loads(Image.open(folder / "book/_static/at-a-glance.png").text["Description"])
                   for folder in (tmp_path / "stage", ROOT))
    assert drawn == kept, "README: copy at-a-glance.png from _build/stage/book/_static, where make site has drawn it"


def test_the_board_lists_the_rows_of_the_arenas_record_unsound_ones_below(tiny):
    book = tiny("1", name="06_arena")
    stage(book)
    folder = book.output / "stage/book"
    assert "There is no record yet" in (folder / "board.md").read_text()
    assert list(pd.read_csv(folder / "downloads/board.csv")) == list(board.COLUMNS)
    empty, found = (folder / "_static/board.png").read_bytes(), Record.start("06_arena", "paper", {})
    run = {"clean": np.zeros(4), "ignored": np.ones(4, bool), "attacks": 2, "milliseconds": 1.0}
    for worst, passed in (([0, 0, 2, 2], True), ([0, 0, 1, 2], True), ([0, 0, 0, 0], False)):
        flag = {"check": "PGD <does> nothing", "passed": passed}
        row = board.row(f"NR {sum(worst)}", "mnist", ("linf", 0.1), run | {"worst": np.array(worst), "flags": [flag]},
                        certified=None, parameters=3, training=2.0)
        found.tables = {"board": [*found.tables.get("board", []), row]}
    executed, path = book.committed("06_arena")
    for kept in (executed, path):
        kept.parent.mkdir(parents=True)
    nbformat.write(book.source("06_arena"), executed)
    path.write_text(found.model_dump_json())
    stage(book)
    listed = (folder / "board.md").read_text()
    assert re.findall(r"notebooks/(\w+)\.html\">(NR \d)<", listed) == [
        ("01_deep_neural_rejection", f"NR {n}") for n in (3, 4, 0)]
    assert "<td>75.0</td>" in listed and "no</strong>: PGD &lt;does&gt; nothing" in listed
    assert "At mnist, L∞, ε = 0.1 most is left of NR 3, 75 per cent." in listed
    rows = json.loads((folder / "downloads/board.json").read_text())
    assert rows == board.kept(book.root) and [row["sound"] for row in rows] == [True, True, False]
    assert (folder / "_static/board.png").read_bytes() != empty


def test_a_series_that_a_fresh_record_lacks_is_named_and_an_older_one_leaves_it_open(tmp_path, monkeypatch):
    for name in ("notebooks", "book"):
        shutil.copytree(ROOT / name, tmp_path / name)
    listed = tmp_path / "book/left.yml"
    listed.write_text(listed.read_text().replace("series: mixed-batch}", "series: mixed}"))
    monkeypatch.setattr(Book, "changed", lambda *_: [])
    with pytest.raises(BookError, match="left.yml: 02_mixed_batch_adversarial_training's record lacks .*'mixed'"):
        what_is_left(Book(tmp_path, tmp_path / "output"))
    monkeypatch.setattr(Book, "changed", lambda *_: ["The notebook's code has changed since this run."])
    rows = [row for row in what_is_left(Book(tmp_path, tmp_path / "output")) if row["chapter"].startswith("02")]
    assert rows and not any(end["shares"] for row in rows for end in (row["weak"], row["informed"]))


def test_the_generated_pages_and_downloads_of_a_site_that_shows_this_run(tiny):
    book = tiny(RECORD)
    commit(book)
    done = command("book", "--show", "run", cwd=book.root, HELPERS_OUTPUT=str(book.output))
    assert done.returncode == 0, done.stderr
    site = book.output / "html"
    html, known = (site / "book/ledger.html").read_text(), claims(ROOT / "book/claims.yml")
    assert all(f"<code>{name}</code>" in html for name in known)
    assert all(claim.what in unescape(html) for claim in known.values())
    assert 'href="../notebooks/02_tiny.html"' in html
    assert (book.output / "stage/book/_static/at-a-glance.png").stat().st_size > 1000
    rows = json.loads(next(site.glob("_downloads/*/ledger.json")).read_text())
    assert {row["Claim"] for row in rows} == set(known)
    assert set(pd.read_csv(next(site.glob("_downloads/*/ledger.csv")))["Claim"]) == set(known)
    reason = "off by 3.33e-05, tolerance 0.004; as printed"
    assert all(reason in path.read_text() for path in [site / "book/ledger.html", *site.glob("_downloads/*/ledger.*")])
    status = (site / "book/status.html").read_text()
    assert re.search(r"<td>02 tiny</td><td>smoke</td><td>2[-\d]+ [:\d]+</td>\s*<td>\d+</td>\s*<td>1 not-test", status)
    assert re.search(r"Tiny chapter</span></a></p></td>\s*<td><p>smoke", status)


def test_a_warning_fails_the_build_and_the_old_site_stays(tiny, capfd):
    book = tiny(RECORD)
    stage(book)
    before = build(book).stat().st_mtime_ns
    (book.root / "book/index.md.jinja").write_text("# Index\n\n[broken](nowhere.md)\n")
    stage(book)
    with pytest.raises(BookError, match="exit code 1"):
        build(book)
    assert "nowhere.md" in capfd.readouterr().err
    assert (book.output / "html/index.html").stat().st_mtime_ns == before
    assert {path.name for path in book.output.iterdir()} == {"html", "stage"}


def test_publish_keeps_outputs_and_record_and_nothing_of_the_machine(tiny):
    book = tiny(RECORD, "import os; print(os.getcwd())", FIGURE)
    execute(book, book.chapters())
    record = book.run("02_tiny")[1].read_text()
    publish(book, "02_tiny")
    executed, paper = book.committed("02_tiny")
    assert paper.read_text() == record
    kept = nbformat.read(executed, 4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in book.source("02_tiny").cells]
    assert kept.cells[-2].outputs[0].text == "notebooks\n" and "papermill" not in text(kept)
    assert (book.root / "book/_static/at-a-glance.png").stat().st_size > 1000
    assert not (book.output / "stage").exists() and "Text after" in text(page(book))


def test_publish_refuses_a_copy_that_is_large_or_stale(tiny):
    book = tiny(RECORD, f"print('{'x' * 99}\\n' * {MAX_BYTES // 100})")
    execute(book, book.chapters())
    with pytest.raises(BookError, match=r"02_tiny: the executed copy has 4,\d{3},\d{3} bytes, more than 4,000,000"):
        publish(book, "02_tiny")
    tiny(RECORD)
    with pytest.raises(BookError, match="02_tiny: the notebook's code has changed since .*02_tiny.ipynb was run"):
        publish(book, "02_tiny")
    assert not any(path.exists() for path in book.committed("02_tiny"))


def test_publish_counts_bytes_and_not_characters(tiny):
    book = tiny("1")
    notebook, (executed, _) = book.source("02_tiny"), book.run("02_tiny")
    notebook.cells[-1].outputs = [new_output("stream", text="ε" * (MAX_BYTES // 2))]
    executed.parent.mkdir(parents=True)
    nbformat.write(notebook, executed)
    with pytest.raises(BookError, match=r"02_tiny: the executed copy has 4,\d{3},\d{3} bytes, more than 4,000,000"):
        publish(book, "02_tiny")


def test_the_contents_list_every_notebook_and_page():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {chapter["file"] for part in toc["parts"] for chapter in part["chapters"]} | {toc["root"]}
    pages = {f"book/{path.name.split('.')[0]}" for path in ROOT.glob("book/*.md*")} - {"book/card"}
    assert listed == pages | {f"notebooks/{path.stem}" for path in ROOT.glob("notebooks/[0-9]*.ipynb")}


def test_committed_copies_are_small_and_have_a_record_of_the_paper_profile():
    copies = {path.stem: path for path in ROOT.glob("book/executed/*.ipynb")}
    records = {path.parent.name: Record.load(path) for path in ROOT.glob("book/results/*/paper.json")}
    assert set(copies) == set(records) and {record.profile for record in records.values()} <= {"paper"}
    assert all(path.stat().st_size <= MAX_BYTES for path in copies.values())
