"""Every chapter runs from nothing in profile smoke: embedded data, no network, and its record is complete."""

import os

import nbformat
import pytest
from conftest import ROOT, papermill

from helpers.book import Book
from helpers.execution import failures
from helpers.records import Record
from helpers.verdicts import claims

CHAPTERS = Book(ROOT, ROOT / "_build").chapters()


@pytest.mark.slow
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter(smoke, chapter):
    book = smoke(chapter)
    assert not failures(book)
    executed, record = nbformat.read(book.run(chapter)[0], 4), Record.load(book.run(chapter)[1])
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    assert code and all(cell.execution_count for cell in code)
    outputs = [(cell.id, output) for cell in code for output in cell.outputs]
    assert not [cell for cell, output in outputs if output.output_type == "error"]
    shown = {cell.id for cell in code if "remove-output" not in cell.metadata.get("tags", [])}
    bare = [cell for cell, output in outputs if cell in shown and output.output_type == "execute_result"
            and set(output.data) == {"text/plain"}]
    assert not bare, f"what their last line returns is shown as Python prints it: {bare}"
    figures = {cell: output.metadata.get("image/png", {}) for cell, output in outputs
               if "image/png" in output.get("data", {})}
    assert not [cell for cell, about in figures.items() if not about.get("alt", "").strip()], "what do they show?"
    assert (record.chapter, record.profile) == (chapter, "smoke")
    assert {data.source for data in record.provenance.datasets.values()} == {"embedded"}
    assert {claim.verdict for claim in record.claims} <= {"not-testable"}, "smoke reproduces nothing"
    assert {claim.id for claim in record.claims} == {name for name in claims() if name[:2] == chapter[:2]}


@pytest.mark.slow
def test_the_template_of_a_chapter_runs_and_is_not_in_the_book(tmp_path):
    papermill(ROOT / "notebooks/template.ipynb", tmp_path, os.environ | {"HELPERS_OUTPUT": str(tmp_path)})
    assert Record.load(tmp_path / "results/00_template/smoke.json").profile == "smoke"
    assert "template" not in CHAPTERS
