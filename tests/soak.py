"""Run chapters over seeds, threads, processors and Pythons, and say what was red: no test, but `make soak RUNS=n`.

A run is one chapter, in a process and a folder of its own. Each appends a line to _build/soak.jsonl as it finishes; a
soak that was stopped goes on there. Runs of other code than today's do not count. With HELPERS_DATA every fifth run of
a chapter is in profile quick. Other Pythons of 3.11 to 3.13 on the PATH get an environment below _build/soak.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

import click
import pandas as pd

from helpers import tracing
from helpers.book import Book
from helpers.files import output
from helpers.tracing import bare

ROOT = Path(__file__).resolve().parents[1]
ONEDNN = ("own", "AVX2", "off", "SSE41")  # instructions that oneDNN may use; own: all that the processor has
VARIANT = ("chapter", "profile", "seed", "threads", "onednn", "python")


def plan(chapters, pythons, quick):
    """Yield (chapter, profile, seed, threads, oneDNN, Python) for ever; the first few already cover what there is."""
    turn = 0
    while True:
        for place, chapter in enumerate(chapters):
            at = (turn + 7 * place) * 21 % 80  # 21 and 80 have no divisor in common: 80 turns meet every combination
            profile = "quick" if quick and turn % 5 == 4 else "smoke"
            python = pythons[(turn // 4 + place) % len(pythons)]
            yield chapter, profile, at // 8, 1 + at // 4 % 2, ONEDNN[at % 4], python
        turn += 1


def settings(threads, onednn, folder):
    """Environment variables of a run."""
    names = ("LOKY_MAX_CPU_COUNT", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    variables = dict.fromkeys(names, str(threads)) | {"HELPERS_OUTPUT": folder, "PYTHONPATH": str(ROOT / "src")}
    variables["TF_ENABLE_ONEDNN_OPTS"] = str(int(onednn != "off"))
    rest = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    return rest | variables | ({} if onednn in ("own", "off") else {"ONEDNN_MAX_CPU_ISA": onednn})


def run(variant, executable):
    """Run one chapter and return its line: the variant, its code, seconds, error (None: green) and raised flags."""
    chapter, profile, seed, threads, onednn, _ = variant
    line = dict(zip(VARIANT, variant, strict=True)) | {"code": code(chapter)}
    folder, started = tempfile.mkdtemp(dir=output("soak").resolve()), time.monotonic()
    command = ["-m", "helpers", "run", "--chapter", chapter, "--profile", profile, "--seed", str(seed)]
    done = subprocess.run([executable, *command], env=settings(threads, onednn, folder), capture_output=True, text=True)
    line |= {"seconds": round(time.monotonic() - started), "error": None, "flags": []}
    note, record = (Path(folder, path) for path in (f"executed/{profile}/{chapter}.failed.json",
                                                    f"results/{chapter}/{profile}.json"))
    if note.exists():
        line["error"] = "{cell}: {error}".format(**json.loads(note.read_text(encoding="utf-8")))
    elif done.returncode or not record.exists():
        line["error"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    else:
        flags = json.loads(record.read_text(encoding="utf-8"))["flags"] or []
        line["flags"] = ["{where}: {check}".format(**flag) for flag in flags if not flag["passed"]]
    shutil.rmtree(folder)
    return line


@cache
def code(chapter):
    """What a run's result belongs to: one sum of the chapter's code and of the helpers that it imports, in turn."""
    source = Book(Path(), output()).code(chapter)
    texts = [source, *(bare(Path(tracing.__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
                       for name in sorted(tracing.imported(source)))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:20]


def interpreters(alone):
    """Executables by version: this one, and what the PATH has beside it, set up from the lock file on first use."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": sys.executable}
    for version in sorted({"3.11", "3.12", "3.13"} - found.keys()) if not alone else []:
        folder = output(f"soak/python{version}").resolve()
        pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--require-hashes", "-r", "requirements.lock"]
        try:
            if not (folder / "ready").exists():
                subprocess.run([f"python{version}", "-m", "venv", folder], check=True, capture_output=True)
                subprocess.run(pip, check=True, capture_output=True)
                (folder / "ready").touch()
            found[version] = str(folder / "bin/python")
        except (OSError, subprocess.CalledProcessError) as error:
            click.echo(f"without Python {version}: {error}")
    return found


def report(lines):
    """Print runs and red ones by variant, every error, and how often each flag was raised; return the number of red."""
    frame = pd.DataFrame(lines).assign(red=lambda frame: frame["error"].notna())
    for name in VARIANT:
        table = frame.groupby(name).agg(runs=("red", "size"), red=("red", "sum"), seconds=("seconds", "median"))
        click.echo(f"\n{table.to_string()}")
    flags = frame.explode("flags").dropna(subset="flags").groupby(["chapter", "profile", "flags"]).size()
    click.echo(f"\nraised flags\n{flags.to_string()}" if len(flags) else "\nno flag was raised")
    for line in (line for line in lines if line["error"]):
        click.echo(f"\nRED {named(line)}\n    {line['error']}")
    click.echo(f"\n{len(frame)} runs, {frame['red'].sum()} red")
    return int(frame["red"].sum())


def named(line):
    return "{chapter}, {profile}, seed {seed}, {threads} threads, oneDNN {onednn}, Python {python}".format(**line)


@click.command(help=__doc__)
@click.option("--runs", default=100, show_default=True, help="In all, those of earlier soaks included.")
@click.option("--jobs", default=2, show_default=True, help="At a time.")
@click.option("--chapter", "prefixes", multiple=True, help="Only this one; may be given again.")
@click.option("--this-python", is_flag=True, help="With no other Python than the one that runs this.")
def main(runs, jobs, prefixes, this_python):
    output("soak").mkdir(parents=True, exist_ok=True)
    chapters, pythons = Book(Path(), output()).chapters(*prefixes), interpreters(this_python)
    variants = plan(chapters, sorted(pythons), bool(os.environ.get("HELPERS_DATA")))
    planned = [variant for variant, _ in zip(variants, range(runs), strict=False)]
    path = output("soak.jsonl")
    kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [line for line in kept if line["code"] == code(line["chapter"])]
    done = {tuple(line[name] for name in VARIANT) for line in lines}
    todo = [variant for variant in planned if variant not in done]
    with ThreadPoolExecutor(jobs) as pool, open(path, "a", encoding="utf-8") as file:
        for future in as_completed(pool.submit(run, variant, pythons[variant[-1]]) for variant in todo):
            lines.append(line := future.result())
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            end = f"RED {line['error']}" if line["error"] else f"{line['seconds']} s {' '.join(line['flags'])}"
            click.echo(f"{len(lines)} of {len(done) + len(todo)}: {named(line)}: {end}")
    sys.exit(report(lines) > 0)


if __name__ == "__main__":
    main()
