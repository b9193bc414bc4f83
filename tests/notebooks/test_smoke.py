"""Every chapter runs from nothing in profile smoke: embedded data, no network, and its record is complete."""

import nbformat
import papermill
import pytest
from conftest import ROOT

from helpers.records import Record, claims

CHAPTERS = sorted(path.stem for path in ROOT.glob("notebooks/[0-9]*.ipynb"))
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


@every_chapter
def test_every_code_cell_ran(site, chapter):
    cells = nbformat.read(site.run(chapter)[0], 4).cells
    code = [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    assert code and all(cell.execution_count for cell in code)
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


@every_chapter
def test_the_record_uses_embedded_data_and_claims_no_reproduction(site, chapter):
    record = Record.load(site.run(chapter)[1])
    assert (record.chapter, record.profile) == (chapter, "smoke")
    assert {data.source for data in record.provenance.datasets.values()} == {"embedded"}
    assert {claim.verdict for claim in record.claims} == {"not-testable"}


@every_chapter
def test_every_claim_of_the_paper_is_answered(site, chapter):
    record = Record.load(site.run(chapter)[1])
    assert {claim.id for claim in record.claims} == {name for name in claims() if name[:2] == chapter[:2]}


@every_chapter
def test_every_figure_says_what_it_shows(site, chapter):
    for cell in nbformat.read(site.run(chapter)[0], 4).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert output.metadata.get("image/png", {}).get("alt", "").strip(), cell.id


@every_chapter
def test_it_takes_minutes_at_most(site, chapter):
    """90 s are the budget on two free cores; a busy machine gets more before the test fails."""
    assert nbformat.read(site.run(chapter)[0], 4).metadata.papermill.duration < 270


def test_the_template_of_a_chapter_runs_and_is_not_in_the_book(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HELPERS_OUTPUT", str(tmp_path))
    papermill.execute_notebook(ROOT / "notebooks/template.ipynb", tmp_path / "run.ipynb", {"PROFILE": "smoke"},
                               kernel_name="python3", cwd=tmp_path, progress_bar=False)
    assert Record.load(tmp_path / "results/00_template/smoke.json").profile == "smoke"
    assert "template" not in site.chapters() and not [*(site.output / "html").rglob("template.html")]
