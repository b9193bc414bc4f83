"""The command line, `python -m helpers`: the Makefile's targets are thin names for it."""

import os
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import click
from filelock import FileLock, Timeout

from helpers import __version__, execution, files, site
from helpers.address import move
from helpers.book import Book, BookError
from helpers.profiles import PROFILES
from helpers.provenance import revision

_chapter = click.option("--chapter", "chapters", multiple=True, metavar="NAME",
                        help="Only this chapter: the start of its name is enough, as in 02. May be repeated.")
_profile = click.option("--profile", type=click.Choice(PROFILES), default="smoke", show_default=True,
                        help="smoke: embedded data, about a minute a chapter. quick: the paper's data, fewer images; "
                        "minutes. paper: the paper's sizes and repeats; hours.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main():
    """Execute the chapters and render the book, in the folder of its checkout.

    `python -m helpers book` does both. Data sets are looked for in the folder HELPERS_DATA, then in the cache, then
    downloaded. Whatever is made goes to the folder HELPERS_OUTPUT, _build where that is not set.
    """


@main.command("book")
@_profile
@_chapter
@click.option("--show", type=click.Choice(["auto", "run"]), default="auto", show_default=True,
              help="auto: a page shows the committed paper run where there is one. run: this run, where it succeeded.")
def make(profile, chapters, show):
    """Execute the chapters, then render the site, also where a chapter failed."""
    failed = None
    with _book(profile, show) as this:
        try:
            execution.execute(this, this.chapters(*chapters))
        except BookError as error:
            failed = error
        index = site.render(this)
        _print_runs(this)
        click.echo(f"\nThe book is at {index}")
    if failed:
        raise failed


@main.command("site")
def render():
    """Render what the repository keeps, without executing anything."""
    with _book(show="committed") as this:
        click.echo(f"The book is at {site.render(this)}")


@main.command()
@_profile
@_chapter
@click.option("--seed", default=0, show_default=True, help="The chapters' parameter SEED.")
def run(profile, chapters, seed):
    """Execute the chapters without rendering the site."""
    with _book(profile) as this:
        execution.execute(this, this.chapters(*chapters), seed)
        _print_runs(this)


@main.command()
@_chapter
def paper(chapters):
    """Execute in profile paper (hours, resumable) and put the results under book/."""
    with _book("paper") as this:
        if revision(this.root)[1]:
            raise BookError("src, notebooks or book/claims.yml are not as committed: commit them first, since a record "
                            "names the commit that it was computed with")
        execution.execute(this, this.chapters(*chapters))
        for chapter in this.chapters(*chapters):
            site.publish(this, chapter)
            click.echo("to be committed: {} {}".format(*this.committed(chapter)))


@main.command()
@_chapter
def cost(chapters):
    """List which kept units of the chapters the code as it is would compute again, and for how long."""
    this = _checkout()
    for chapter in this.chapters(*chapters):
        rows = execution.cost(this, chapter)
        click.echo(f"{chapter}: {sum(row['seconds'] for row in rows.values()):.0f} s of computing")
        for function, row in rows.items():
            why = sorted(row["changed"])
            more = f" and {len(why) - 3} more" if len(why) > 3 else ""
            click.echo(f"  {function:20} {row['again']:4} of {row['units']:4} units {row['seconds']:8.0f} s"
                       + (f"  changed: {', '.join(why[:3])}{more}" if why else ""))


@main.command()
@_chapter
@click.option("--networks", is_flag=True, help="With the networks and defences that the units have made: megabytes.")
def keep(chapters, networks):
    """Put the results of finished units under book/units, for a paper run to go on from on another machine.

    For a run that does not fit into one sitting. Without --networks a unit that still needs one of them stops the run
    elsewhere, until the file under book/units is removed and the units are computed again.
    """
    with _book("paper") as this:
        for chapter in this.chapters(*chapters):
            archive, units = execution.keep(this, chapter, networks)
            click.echo(f"to be committed: {archive}, {units} units, {archive.stat().st_size:,} bytes")


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", "dataset", default="digits", show_default=True, help="Data set of helpers.data.")
@click.option("--norm", type=click.Choice(["linf", "l2"]), default="linf", show_default=True)
@click.option("--eps", default=0.1, show_default=True, help="Radius, pixels in [0, 1].")
@click.option("--images", type=click.IntRange(1), default=200, show_default=True,
              help="Test images, the first of those of the board; 100 take a few minutes.")
@click.option("--seed", default=0, show_default=True)
@click.option("--randomised", is_flag=True, help="A network of FILE may give one image two answers.")
def arena(file, dataset, norm, eps, images, seed, randomised):
    """Attack the defence in FILE with all the book has, and write what is left as JSON and as a page.

    FILE is a network saved as .keras, or a Python file with a function `defence` that gives a Keras network, a function
    from images to logits, or an object with `randomised`, a call and `paths` (see CONTRIBUTING.md, and the file
    book/my_defence.py). It says what is left, which flags are raised and what to try, and the place on the board.
    """
    from helpers import arena, board, data, guest, report  # TensorFlow takes seconds, and other commands need none
    from helpers.threat import ThreatModel

    try:
        threat, loaded, options = ThreatModel(norm, eps), data.load(dataset), {"images": images, "seed": seed}
        brought = guest.opened(file, randomised)
        entry = arena.examine(brought, loaded, threat, name=file.stem, label="attacks",
                              surrogate=arena.rival(loaded, seed), **options)
    except (guest.ArenaError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    place = board.place(entry.summary(), board.kept())
    for line in report.lines(entry, place):
        click.echo(line)
    for path in report.write(entry, files.output("arena"), place):
        click.echo(f"written: {path}")


@main.command()
@click.option("--data", "dataset", default="mnist", show_default=True, help="Data set of helpers.data, 28 x 28 pixels.")
@click.option("--images", type=click.IntRange(1), help="Training images; all where it is not given.")
@click.option("--epochs", type=click.IntRange(1), help="At most so many in each stage of training.")
@click.option("--folder", type=click.Path(file_okay=False, path_type=Path), help="Where to write; the page's own.")
def lab(dataset, images, epochs, folder):
    """Train the lab's three networks (minutes, resumable), and write them and their record for the page."""
    with _book() as this:
        from helpers.lab import make  # TensorFlow takes seconds, which the other commands do not need

        for path in make(folder or this.root / "book/_static/lab", dataset, images, epochs):
            click.echo(f"written: {path}")


@main.command()
@click.argument("url")
def address(url):
    """Write the repository's address, https://github.com/<owner>/<name>, to all files that name it."""
    for path in move(_checkout().root, url):
        click.echo(f"written: {path}")


@main.command()
def status():
    """Show the last run of each chapter on this machine."""
    _print_runs(_checkout())


def _checkout(profile="smoke", show="auto"):
    if not Path("_config.yml").exists():
        raise BookError(f"no _config.yml in {Path.cwd()}: run this in the folder of the book's checkout")
    this = Book(Path.cwd(), files.output().resolve(), profile, show)
    if folder := os.environ.get("HELPERS_DATA"):
        os.environ["HELPERS_DATA"] = os.path.abspath(folder)  # a chapter runs in another folder
    try:
        Path.home()
    except RuntimeError:  # as in a container, for a user that it does not know
        os.environ["HOME"] = str(this.output / "home")
    return this


@contextmanager
def _book(profile="smoke", show="auto"):
    """The checkout, for one command at a time: each would remove what another makes in the same folder."""
    this = _checkout(profile, show)
    this.output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(this.output / ".lock")  # the system's: it goes with the process that holds it
    try:
        lock.acquire(blocking=False)
    except Timeout:
        click.echo(f"another command is at work in {this.output}: waiting for its end", err=True)
        lock.acquire()
    with lock:
        yield this


def _print_runs(this):
    for run in execution.status(this):
        verdicts = Counter(claim.verdict for claim in run.claims)
        text = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())
        click.echo(f"{run.chapter:40} {run.profile:6} {run.provenance.seconds:7.0f} s  {text}")
    for failure in execution.failures(this):
        click.echo(f"{failure.chapter:40} {failure.profile:6}    failed  {failure.cell}: {failure.error}")
