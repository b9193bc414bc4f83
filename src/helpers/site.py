"""From executed notebooks to the site: `stage` (lay out the pages), `build` (Jupyter Book); `publish` keeps a run.

    executed notebooks, records ─ stage ─► output/stage/ ─ build ─► output/html/
"""

import base64
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
import yaml
from docutils.nodes import make_id

from helpers.address import is_set
from helpers.book import Book, BookError, code_cells, same_code, written
from helpers.execution import failures, status
from helpers.files import atomic
from helpers.profiles import PROFILES
from helpers.records import Record
from helpers.units import makespan
from helpers.verdicts import VERDICTS, claims, compare

MAX_BYTES = 4_000_000  # of an executed copy in the repository
MAX_CHARACTERS = 2_000  # of an error on a page
WIDTH = 0.6  # of a figure on a page, in pixels of its own: wide ones are as small on its 700 pixels


def publish(book: Book, chapter: str) -> None:
    """Copy the run's notebook and record under `book/`.

    Raises BookError when the notebook has changed, is too large, or a raised flag is not explained in book/flags.yml.
    """
    (ran, record), (executed, paper) = book.run(chapter), book.committed(chapter)
    if not ran.exists():
        raise BookError(f"{chapter}: there is no run, {ran}")
    if not book.as_written(ran, chapter):
        raise BookError(f"{chapter}: the notebook's code has changed since {ran} was run")
    text = nbformat.writes(_page(book, chapter, ran)) + "\n"
    if (size := len(text.encode())) > MAX_BYTES:
        raise BookError(f"{chapter}: the executed copy has {size:,} bytes, more than {MAX_BYTES:,}")
    explained = _explained(book, chapter)
    if missing := [str(flag) for flag in Record.load(record).raised() if flag.name not in explained]:
        raise BookError(f"{chapter}: raised flags that no sentence explains:\n  " + "\n  ".join(missing) +
                        "\nFind out why; where it is a finding, say so in book/flags.yml, and run this again.")
    for path, content in ((executed, text), (paper, record.read_text(encoding="utf-8"))):
        with atomic(path) as temporary:
            temporary.write_text(content, encoding="utf-8")
    _at_a_glance(ledger(book), book.root)  # for the README


def _explained(book, chapter):
    """The sentences of book/flags.yml, by the names of the chapter's flags."""
    return _listed(book, "flags").get(chapter, {})


def _listed(book, name):
    """What book/<name>.yml lists by chapter; nothing, where there is no such file."""
    path = book.root / f"book/{name}.yml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def errata(book: Book, chapter: str) -> list[str]:
    """What is known to be wrong in the committed run of a chapter, sentences of book/errata.yml.

    Raises BookError where they speak of another run than the committed one: a new run has to be read afresh.
    """
    if not (found := _listed(book, "errata").get(chapter)):
        return []
    ran = Record.load(book.committed(chapter)[1]).provenance.commit
    if not ran.startswith(found["run"]):
        raise BookError(f"book/errata.yml: {chapter}'s sentences are about the run of commit {found['run']}; the one "
                        f"that is kept is of {ran[:10]}: delete what it has mended, and name it there")
    for start in found.get("withdrawn", []):
        if not any(id.startswith(start) for id in claims()):
            raise BookError(f"book/errata.yml: {chapter} withdraws {start!r}, with which no claim begins")
    return found["wrong"]


def _page(book, chapter, executed):
    """The source notebook with the outputs of an executed copy; where their code differs, the copy as it is.

    What papermill injected, what libraries logged and this machine's paths stay behind.
    """
    page, ran = book.source(chapter), nbformat.read(executed, 4)
    if not same_code(page, ran):
        page.cells = [nbformat.from_dict({**cell, "metadata": {"tags": cell.metadata.get("tags", [])}})
                      for cell in written(ran)]
    for cell, done in zip(code_cells(page), code_cells(ran), strict=True):
        outputs = [output for output in done.outputs if output.get("name") != "stderr"]
        cell.outputs = nbformat.from_dict(_without_places(book, outputs))
        cell.execution_count = done.execution_count
    return page


def _without_places(book, told):
    """Text, or the texts within outputs, without the folders of this machine that stand before its paths."""
    data = os.environ.get("HELPERS_DATA") or sys.prefix
    folders = map(str, [book.root, book.output, data, sys.prefix, Path.home(), tempfile.gettempdir()])
    names = "|".join(re.escape(f"{folder}/") for folder in sorted(folders, key=len, reverse=True))
    places = re.compile(rf"(?<![\w+/])(?:{names})")

    def without(part):
        if isinstance(part, str):
            return places.sub("", part)
        if isinstance(part, dict):
            return {key: without(value) for key, value in part.items()}
        return [without(value) for value in part] if isinstance(part, list) else part

    return without(told)


def _in_one_fold(page):
    """Put hidden code that shows nothing into the fold of the hidden cell behind it: one fold in a row, not seven."""
    cells = []
    for cell in page.cells:
        if cells and _is_hidden(cells[-1]) and not cells[-1].outputs and _is_hidden(cell):
            cell.source = f"{cells.pop().source}\n\n\n{cell.source}"
        cells.append(cell)
        if "remove-output" in cell.metadata.get("tags", []):
            cell.outputs = []
    page.cells = cells
    return page


def _is_hidden(cell):
    """Whether a reader has to open a cell's code."""
    return cell.cell_type == "code" and bool({"hide-input", "hide-cell"} & {*cell.metadata.get("tags", [])})


def _with_figures(page, folder, chapter):
    """Turn every figure into a MyST figure, with the alternative text and caption that its output brings along.

    Text is of one size in all figures that are not too wide for it. The first that is marked as the cover stands
    under the title as well.
    """
    cover = None
    for cell in page.cells:
        figures = [output for output in cell.get("outputs", []) if "image/png" in output.get("metadata", {})]
        for label, output in zip([cell.id, *(f"{cell.id}-{n}" for n in range(2, 99))], figures, strict=False):
            about, name = output.metadata["image/png"], f"{chapter}-{label}.png"
            picture = base64.b64decode(output.data["image/png"])
            (folder / name).write_bytes(picture)
            width = round(WIDTH * int.from_bytes(picture[16:20]))  # of a PNG
            alt, at = json.dumps(about["alt"], ensure_ascii=False), f"fig-{chapter[:2]}-{label}"
            head, caption = f":::{{figure}} {name}\n:alt: {alt}\n:width: {width}px\n", about.get("caption", "")
            output.data = {"text/markdown": f"{head}:name: {at}\n\n{caption}\n:::"}
            if about.get("cover") and not cover:
                cover = f"{head}\n{caption} [Where it is computed](#{at}).\n:::"
    if cover:
        page.cells.insert(1, nbformat.v4.new_markdown_cell(cover, id="cover"))
    return page


def _cover(page):
    """The picture under the title of a chapter's page: the head of a figure for a page of the book, empty without."""
    found = [cell.source.partition("\n\n")[0] for cell in page.cells if cell.id == "cover"]
    return found[0].replace(":::{figure} ", ":::{figure} ../notebooks/", 1) if found else ""


def _kept(book):
    """The committed records by chapter, as `_judged`."""
    records = map(Record.load, sorted(book.root.glob("book/results/*/paper.json")))
    return {record.chapter: _judged(book, record) for record in records}


def _judged(book, record):
    """A record by today's rules, less the verdicts that the errata of its run withdraw."""
    about = _listed(book, "errata").get(record.chapter)
    known = about and record.provenance.commit.startswith(about["run"])
    return record.judged_again(about.get("withdrawn", []) if known else [])


def ledger(book: Book, kept: dict | None = None) -> pd.DataFrame:
    """Every claim of the papers: what the committed paper-profile record found, the section that shows it, the run.

    kept : the committed records, where they have been read.
    """
    known, papers = claims(), yaml.safe_load((book.root / "book/claims.yml").read_text(encoding="utf-8"))["papers"]
    if missing := {name[:2] for name in known} - papers.keys():
        raise BookError(f"book/claims.yml: under papers, no entry for {', '.join(sorted(missing))}")
    chapters, kept = {name[:2]: name for name in book.chapters()}, _kept(book) if kept is None else kept
    found = {outcome.id: outcome for record in kept.values() for outcome in record.claims}
    doubts = {outcome.id: record.raised(outcome.id) for record in kept.values() for outcome in record.claims}
    frame = compare(dict.fromkeys(known) | found, doubts)
    sound = {outcome.id: "not recorded" if record.flags is None else "no" if doubts[outcome.id] else "yes"
             for record in kept.values() for outcome in record.claims}
    frame.insert(0, "Title", [f"{name[:2]} {papers[name[:2]]['short']}" for name in frame["Claim"]])
    frame["Sound"] = [sound.get(name, "") for name in frame["Claim"]]
    frame.insert(2, "Where", [known[name].where for name in frame["Claim"]])
    pages = {name: f"notebooks/{chapters[name[:2]]}.html" for name in known if name[:2] in chapters}
    # A chapter that is still to be run has sections that its page, an older copy, may not have.
    older = {name for name, record in kept.items() if not book.as_written(book.committed(name)[0], name)}
    sections = {name: page if name not in found or chapters[name[:2]] in older else
                f"{page}#{make_id(known[name].section)}" for name, page in pages.items()}
    frame["Section"] = [sections.get(name, "") for name in frame["Claim"]]
    runs = {record.chapter[:2]: f"{record.created[:10]}, {record.provenance.commit[:10]}" for record in kept.values()}
    frame["Run"] = [runs.get(name[:2], "") if name in found else "" for name in frame["Claim"]]
    return frame


def _at_a_glance(frame, folder):
    """Draw how many claims of each paper have which verdict; return the numbers: title -> verdict -> number."""
    from helpers.figures import verdict_bars

    each = frame.drop_duplicates("Claim")
    counts = pd.crosstab(each["Title"], each["Verdict"]).to_dict("index")
    with atomic(folder / "book/_static/at-a-glance.png") as path:
        verdict_bars(counts).savefig(path, dpi=150, metadata={"Description": json.dumps(counts)})
    return counts


def what_is_left(book: Book, kept: dict | None = None) -> list[dict]:
    """The defences of book/left.yml: the text there, and for "weak" and "informed" also `shares`, one a seed.

    A share is of the images on which the attacker does not win; without a committed record there are none.
    Raises BookError for a curve, series or eps that a fresh record does not have; an older one may have had others.
    """
    rows = yaml.safe_load((book.root / "book/left.yml").read_text(encoding="utf-8"))["defences"]
    kept = _kept(book) if kept is None else kept
    for row in rows:
        for end in (row["weak"], row["informed"]):
            end["shares"] = []
            if record := kept.get(row["chapter"]):
                try:
                    curve = record.curves[end["curve"]]
                    (at,) = (k for k, eps in enumerate(curve.x) if abs(eps - row["eps"]) < 1e-4)
                    found = [run[at] for run in curve.series[end["series"]]]
                except (KeyError, ValueError) as error:
                    if book.changed(*book.committed(row["chapter"])):  # until the chapter as it is now has been run
                        continue
                    raise BookError(f"book/left.yml: {row['chapter']}'s record lacks {end} at {row['eps']}") from error
                end["shares"] = [1 - share for share in found] if end.get("beaten") else found
    return rows


def _left_standing(rows, folder):
    """Draw `what_is_left`."""
    from helpers.figures import left_standing

    with atomic(folder / "book/_static/what-is-left.png") as path:
        left_standing({f"{row['defence']}\n{row['threat']}": [row[end]["shares"] for end in ("weak", "informed")]
                       for row in rows}).savefig(path, dpi=150)


def _board(record, folder):
    """Draw the board and write its rows as CSV and JSON; return what its page shows."""
    from helpers import board

    rows = board.rows(record)
    board.figure(rows).savefig(folder / "book/_static/board.png", dpi=150)
    frame, downloads = pd.DataFrame(rows, columns=list(board.COLUMNS)), folder / "book/downloads"
    frame.to_csv(downloads / "board.csv", index=False, encoding="utf-8")
    (downloads / "board.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    best = {f"{row['data']}, {board.threat(row)}": None for row in rows}
    for row in reversed([row for row in rows if row["sound"]]):  # the most that is left comes first
        best[f"{row['data']}, {board.threat(row)}"] = row
    return {"board": rows, "threats": best, "run": record}


def _primer(folder):
    """Draw the primer's pictures."""
    from helpers import primer

    for name in ("binarization", "indicators"):
        getattr(primer, name)().savefig(folder / f"book/_static/{name}.png", dpi=150)


def render(book: Book) -> Path:
    """Lay out the pages and render them; return the site's first page."""
    stage(book)
    return build(book)


def stage(book: Book) -> None:
    """Lay out what Sphinx reads in output/stage: pages, notebooks with outputs and card, and the pages of templates."""
    stage = book.output / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    unshown = shutil.ignore_patterns("executed", "results", "units", "*.jinja")
    shutil.copytree(book.root / "book", stage / "book", ignore=unshown)
    shutil.copy(book.root / "_toc.yml", stage)
    (stage / "_config.yml").write_text(_config(book), encoding="utf-8")
    for name in ("notebooks", "book/downloads"):
        (stage / name).mkdir()
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(book.root / "book"), trim_blocks=True, autoescape=True)
    kept = _kept(book)
    frame = ledger(book, kept)
    frame.to_csv(stage / "book/downloads/ledger.csv", index=False, encoding="utf-8")
    frame.to_json(stage / "book/downloads/ledger.json", orient="records", indent=1, force_ascii=False)
    wrong = {chapter: errata(book, chapter) for chapter in book.chapters()}
    staged = {chapter: _stage_chapter(book, chapter, stage, pages, wrong[chapter]) for chapter in wrong}
    shown = {chapter: record for chapter, (record, _) in staged.items()}
    data = {"ledger": frame.to_dict("records"), "counts": _at_a_glance(frame, stage), "shown": shown,
            "changed": {chapter: book.changed(*book.shown(chapter)) for chapter in shown if shown[chapter]},
            "stale": [chapter for chapter in kept if book.changed(*book.committed(chapter))],
            "kept": kept, "left": what_is_left(book, kept), "errata": wrong, "verdicts": [*VERDICTS, "no record yet"],
            "plans": _plans(kept), "runs": status(book), "failures": failures(book),
            "has_address": is_set(book.root), "covers": {chapter: cover for chapter, (_, cover) in staged.items()}}
    _left_standing(data["left"], stage)
    data |= _board(kept.get("06_arena"), stage)
    _primer(stage)
    for name in ("index.md", "ledger.md", "board.md", "status.md"):
        text = pages.get_template(f"{name}.jinja").render(data)
        (stage / "book" / name).write_text(text, encoding="utf-8")


def _plans(records):
    """What a paper run of each chapter takes on more workers, by the seconds that its units took: rows of a table."""
    plans = []
    for chapter, record in records.items():
        run = record.provenance
        if each := [seconds for units in (run.units or {}).values() for seconds in units]:
            at_once = dict.fromkeys(run.units, run.cpu_count) if run.processes is None else run.processes
            if run.units.keys() - at_once.keys():  # on a cluster: what else there was to do is not known
                continue
            computing = sum(makespan({name: run.units[name]}, at_once[name]) for name in run.units)
            alone = max(0.0, run.seconds - computing)  # what is no unit, or waits for one
            plans.append({"chapter": chapter, "units": len(each), "minutes": max(each) / 60, "on": run.device,
                          "hours": [(alone + makespan(run.units, n)) / 3600 for n in (1, 8, 64)]})
    return plans


def _config(book):
    """The text of _config.yml; as long as the repository has no address, without the buttons that lead there."""
    text = (book.root / "_config.yml").read_text(encoding="utf-8")
    if is_set(book.root):
        return text
    config = {name: part for name, part in yaml.safe_load(text).items() if name not in ("repository", "launch_buttons")}
    buttons = {"repository_url": "", "launch_buttons": {}, "use_repository_button": False, "use_issues_button": False}
    config["sphinx"]["config"]["html_theme_options"] |= buttons
    return yaml.safe_dump(config, sort_keys=False)


def _stage_chapter(book, chapter, stage, pages, wrong):
    """Write a chapter's page and downloads; return its record, None where it shows no results, and its `_cover`.

    wrong : the errata of the committed run, which a page that shows another run leaves out.
    """
    found, downloads = book.shown(chapter), stage / "book/downloads"
    page, record = book.source(chapter), None
    if found:
        page, record = _page(book, chapter, found[0]), _judged(book, Record.load(found[1]))
    nbformat.write(page, downloads / f"{chapter}.ipynb")
    if record:
        (downloads / f"{chapter}.json").write_text(record.model_dump_json(indent=1), encoding="utf-8")
        record.comparison(repeat=True).to_csv(downloads / f"{chapter}.csv", index=False, encoding="utf-8")
    known = [*(book.run(chapter, name)[1] for name in PROFILES), book.committed(chapter)[1]]
    times = {path.stem: Record.load(path).provenance.seconds for path in known if path.exists()}
    title = page.cells[0].source.splitlines()[0].lstrip("# ")
    changed = book.changed(*found) if found else []
    facts = {"chapter": chapter, "title": title, "record": record, "times": times, "changed": changed,
             "explained": _explained(book, chapter), "paper": any(name[:2] == chapter[:2] for name in claims())}
    banners = _banners(book, chapter, changed, wrong if found == book.committed(chapter) else [])
    card = banners + pages.get_template("card.md.jinja").render(facts)
    page.cells.insert(1, nbformat.v4.new_markdown_cell(card, id="card"))
    page = _with_figures(_in_one_fold(page), stage / "notebooks", chapter)
    nbformat.write(page, stage / f"notebooks/{chapter}.ipynb")
    return record, _cover(page)


def _banners(book, chapter, changed, wrong):
    """Admonitions above the card: what has changed since the run that is shown, what is `wrong` in it, failed runs."""
    text = f":::{{warning}}\n{' '.join(changed)}\n:::\n\n" if changed else ""
    if wrong:
        listed = "\n".join(f"- {sentence.strip()}" for sentence in wrong)
        text += f":::{{admonition}} Errata of this run: do not quote these\n:class: danger\n{listed}\n:::\n\n"
    for failure in (failure for failure in failures(book) if failure.chapter == chapter):
        said = _without_places(book, f"{failure.cell}: {failure.error}")[:MAX_CHARACTERS]
        said = re.sub(r"\x1b\[[\d;]*m|[\x00-\x08\x0b-\x1f]", "", said)  # colours of a terminal
        colons, ticks = (max(re.findall(f"{mark}+", said) + [2 * mark], key=len) + mark for mark in ":`")
        text += (f"{colons}{{error}}\nThe last run in profile {failure.profile} on the machine that built this page "
                 f"failed, on {failure.ended[:10]}:\n\n{ticks}text\n{said}\n{ticks}\n{colons}\n\n")
    return text


def build(book: Book) -> Path:
    """Render the stage with Jupyter Book, warnings as errors, and put the site in its place; return its first page."""
    with tempfile.TemporaryDirectory(dir=book.output) as made, tempfile.TemporaryDirectory() as plain:
        pages = book.output / "stage"
        if glob.escape(pages) != str(pages):  # Sphinx looks for the pages of a folder a[b] in a folder ab
            pages = shutil.copytree(pages, Path(plain, "stage"))
        command = [Path(sysconfig.get_path("scripts"), "jupyter-book"), "build", pages]
        options = ["-W", "--keep-going", "-q", "--path-output", made]
        if code := subprocess.run([*command, *options], stdout=subprocess.DEVNULL).returncode:
            raise BookError(f"jupyter-book ended with exit code {code}: its warnings, above, count as errors")
        site, new = book.output / "html", Path(made, "_build/html")
        for chapter in book.chapters():  # the page's own download button offers the notebook without card
            shutil.copy(book.output / f"stage/book/downloads/{chapter}.ipynb", new / "_sources/notebooks")
        scripts = {*new.glob("_static/mathjax/*.js")} - {new / "_static/mathjax/tex-chtml.js"}  # pages load this
        spoken = [path for path in new.glob("_static/mathjax/sre/mathmaps/*.json") if path.stem not in ("base", "en")]
        for unused in [*scripts, *spoken, *new.glob("_static/**/*.map")]:  # half of the site's bytes
            unused.unlink()
        if site.exists():
            site.rename(Path(made, "old"))
        new.rename(site)
    return site / "index.html"
