"""Result records: what the papers claim, what we found for each claim, the verdict, and where the numbers came from."""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import yaml
from joblib import cpu_count
from pydantic import BaseModel, Field, NonNegativeInt, model_validator

from helpers import __version__, files
from helpers.checks import known
from helpers.profiles import PROFILES
from helpers.tracing import NO_COMPUTE
from helpers.units import PACKAGES, earlier_seconds, taken, versions

_VERDICTS = ("reproduced", "undecided", "direction", "not-reproduced", "not-testable")  # from the best to the worst
_FACTOR = 3  # a rate that is so many times the paper's, or a part of it, has not even its direction
Verdict = Literal[_VERDICTS]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_PACKAGE = Path(__file__).resolve().parent
_SUBSTITUTED = ("05",)  # papers whose data is not public: on other data a number can at best agree in direction


class _Strict(BaseModel, strict=True, extra="forbid", validate_assignment=True):
    """What all parts of a record have in common: no other fields, no conversion of types."""


class Claim(_Strict):
    """A number or a statement of a paper that can be checked; `value` is a dictionary where it has several columns.

    `rate`: whether the value is a share, for which "direction" asks for a like size.
    `section`: the heading, in the paper's chapter, below which ours is shown.
    """

    id: str
    where: str
    what: str = ""
    kind: Literal["number", "order", "choice", "shown"]
    value: Finite | dict[str, Finite] | None
    tolerance: Finite = 0.0
    rate: bool = False
    section: str = "The paper and ours, side by side"


class Measurement(_Strict):
    """One value a seed, their mean and their sample standard deviation (0 where n = 1)."""

    mean: Finite
    sd: Finite
    n: int
    values: list[Finite]

    @property
    def error(self):
        """Standard error of the mean; 0 for one value, which says nothing about its own."""
        return self.sd / self.n**0.5

    def __str__(self):
        return f"{self.mean:.4g} ± {self.sd:.2g} (n = {self.n})" if self.n > 1 else f"{self.mean:.4g} (n = 1)"


class Outcome(_Strict):
    """What we found for a claim."""

    id: str
    ours: Measurement | dict[str, Measurement] | None
    verdict: Verdict
    note: str


class Source(_Strict):
    """Where a data set came from, and how much of it was used."""

    source: Literal["mirror", "cache", "download", "embedded"]
    sha256: Sha256
    n_train: NonNegativeInt
    n_test: NonNegativeInt


class Provenance(_Strict):
    """What made the numbers; outside a checkout `commit` is the version of the helpers and `dirty` None.

    helpers, helpers_sha256 : the modules of helpers that the chapter had loaded, and the SHA-256 of their source; in
    records from before they were told apart, of all.
    units : seconds of each unit by function, longest first; records from before they were kept have none.
    """

    commit: str
    dirty: bool | None
    helpers: list[str] | None = None
    helpers_sha256: Sha256
    python: str
    packages: dict[str, str]
    device: str
    cpu_count: int
    seconds: Finite
    units: dict[str, list[Finite]] | None = None
    datasets: dict[str, Source]


class Curve(_Strict):
    """For each series one list a seed, with a value for each of `x`."""

    x: list[Finite]
    series: dict[str, list[list[Finite]]]

    @model_validator(mode="after")
    def _matches_x(self):
        for name, runs in self.series.items():
            if {len(run) for run in runs} != {len(self.x)}:
                raise ValueError(f"series {name!r}: got {[*map(len, runs)]} values, expected {len(self.x)} each")
        return self


def helpers_sha256(names: Iterable[str] | None = None) -> str:
    """Return one SHA-256 of the source of helpers that compute numbers, of what `sha256sum` prints; None: of all."""
    computing = (path for path in sorted(_PACKAGE.glob("*.py")) if path.stem not in NO_COMPUTE)
    sums = (f"{files.sha256(path)}  {path.name}\n" for path in computing if names is None or path.stem in names)
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _loaded() -> list[str]:
    """Names of the modules of helpers that compute numbers and have been imported."""
    names = (name.removeprefix("helpers.") for name in sys.modules if name.startswith("helpers."))
    return sorted(name for name in names if name not in NO_COMPUTE and "." not in name)


def claims(path: str | Path | None = None) -> dict[str, Claim]:
    """Return the papers' claims by id, from `path` or the book's claims.yml."""
    path = path or next(filter(Path.exists, (_PACKAGE / "claims.yml", _PACKAGE.parents[1] / "book/claims.yml")))
    return dict(_claims(Path(path).read_text(encoding="utf-8")))


@lru_cache(1)  # a record asks for them at every claim and flag, and to read the text takes a tenth of a second
def _claims(text):
    return {claim["id"]: Claim.model_validate(claim) for claim in yaml.safe_load(text)["claims"]}


def compare(outcomes: Mapping[str, Outcome | None], raised: Mapping[str, Iterable["Flag"]] | None = None):
    """Return the papers' values beside ours (None: no record yet), as text: a row for each claim, or column of it.

    `raised`: the flags, by claim, that say that its evaluation is not sound; the note begins with them.
    """
    every, rows = claims(), []
    for id, outcome in outcomes.items():
        claim, ours = every[id], outcome.ours if outcome else None
        verdict, note = (outcome.verdict, outcome.note) if outcome else ("no record yet", "")
        parts = ours if isinstance(ours, dict) else {"": ours}
        papers = claim.value if isinstance(claim.value, dict) else dict.fromkeys(parts, claim.value)
        doubt = "; ".join(f"NOT SOUND: {flag}" for flag in (raised or {}).get(id, []))
        tested = claim.kind == "number" and ours and verdict != "not-testable"
        rows += [(id, ": ".join(filter(None, (claim.what or claim.where, part))),
                  "–" if paper is None else f"{paper:g}", _ours(claim, parts.get(part)), verdict,
                  "; ".join(filter(None, [doubt, _distance(claim, parts[part], paper) if tested else "", note])))
                 for part, paper in papers.items()]
    return pd.DataFrame(rows, columns=["Claim", "What", "Paper", "Ours", "Verdict", "Note"])


def _ours(claim, ours):
    if ours and claim.kind == "choice":  # a mean of choices was never chosen
        return f"{' or '.join(f'{value:g}' for value in dict.fromkeys(ours.values))} (n = {ours.n})"
    return str(ours or "–")


class Flag(_Strict):
    """Whether one condition of a sound evaluation was met: a row of `helpers.flags`, and what it was checked on.

    `spoils`: beginnings of the ids of the claims whose numbers hang on it; none: all of the chapter. "NN.beyond" is the
    beginning of none: what hangs on it goes beyond the paper.
    """

    where: str
    check: str
    measured: Finite
    low: Finite
    high: Finite
    limit: Finite
    relation: Literal[">=", "<="]
    n: NonNegativeInt
    passed: bool
    spoils: list[str] = []

    @property
    def name(self):
        """What it was checked on, and the check: by this name book/flags.yml explains it."""
        return f"{self.where}: {self.check}"

    def __str__(self):
        interval = f" ({self.low:.3g} to {self.high:.3g})" if self.low < self.high else ""
        wanted = {">=": "at least", "<=": "at most"}[self.relation]
        return f"{self.name} is {self.measured:.3g}{interval}, expected {wanted} {self.limit:.3g}, n = {self.n}"

    def touches(self, id):
        """Whether the numbers of the claim `id` hang on it."""
        return not self.spoils or any(id.startswith(start) for start in self.spoils)


class Record(_Strict):
    """The results of one run of a chapter.

    `start` it, add to it with `claim`, `flag`, `table` and `curve`, then `save` it.
    """

    chapter: Annotated[str, Field(pattern=r"^\d\d_\w+$")]
    profile: Literal[PROFILES]
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    provenance: Provenance
    claims: list[Outcome] = []
    flags: list[Flag] | None = None  # records from before there were flags have none
    tables: dict[str, list[dict[str, str | bool | int | Finite | None]]] = {}
    curves: dict[str, Curve] = {}

    @classmethod
    def start(cls, chapter: str, profile: str, datasets: Mapping[str, Mapping]) -> "Record":
        """Return an empty record of `chapter` (its notebook's stem), whose clock starts now.

        `datasets` holds the `provenance()` of each data set by name.
        """
        commit, dirty = _revision()
        return cls(chapter=chapter, profile=profile, created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", provenance={
            "commit": commit, "dirty": dirty, "helpers": (names := _loaded()), "helpers_sha256": helpers_sha256(names),
            "python": platform.python_version(), "device": _device(), "cpu_count": cpu_count(), "seconds": 0.0,
            "packages": versions(*PACKAGES), "datasets": dict(datasets)})

    def claim(self, id: str, values, note="", direction: bool | None = None, choice_tie=False) -> Verdict:
        """Add our `values` of a claim, one a seed (by column where the paper has several), and return the verdict.

        number: reproduced where the mean of the seeds is within the claim's tolerance; undecided, more seeds, where it
        is not and the tolerance reaches into mean +- 2 standard errors; else `direction` says whether the effect has
        the paper's sign, for a rate within a factor of three. order: values are differences, positive where the
        statement holds; reproduced beyond 2 standard errors. choice: what each seed selected; `choice_tie` says
        that the paper's choice is as good within one standard error. shown: `direction` says whether the statement
        holds. `values=None`: it cannot be tested, and `note` says why. The worst column counts; the profile smoke
        tests nothing.
        Raises ValueError for an id that is not one of this chapter or was given before, and for what a claim lacks.
        """
        every = claims()
        claim = every[known("id", id, every)]
        if id[:2] != self.chapter[:2] or id in {outcome.id for outcome in self.claims}:
            raise ValueError(f"id: {id!r} belongs to another chapter than {self.chapter}, or was given before")
        if values is None and not note:
            raise ValueError(f"note: {id!r} has no values, expected a note that says why")
        parts = values if isinstance(values, Mapping) else {} if values is None else {"": values}
        columns = parts if claim.value is None else [""]  # a statement has the columns that we give it
        papers = claim.value if isinstance(claim.value, dict) else dict.fromkeys(columns, claim.value)
        if values is not None and (not parts or parts.keys() != papers.keys()):
            raise ValueError(f"values: got {sorted(parts)}, expected the columns {sorted(papers)} of {id!r}")
        ours = {part: _measure(seeds) for part, seeds in parts.items()}
        ranks = [_judge(claim, ours[part], papers[part], direction, choice_tie) for part in ours]
        verdict = max(ranks, key=_VERDICTS.index) if ranks else "not-testable"
        verdict = "not-testable" if self.profile == "smoke" else verdict  # which is never a reproduction
        self.claims.append(Outcome(id=id, ours=ours.get("", ours or None), note=note, verdict=verdict))
        return verdict

    def flag(self, where: str, rows: Iterable[Mapping] | pd.DataFrame, spoils: Iterable[str] = ()) -> pd.DataFrame:
        """Add rows of `helpers.flags`, checked on `where` (a network, an attack, a data set), and return their table.

        `spoils`: beginnings of the ids whose numbers hang on them, or "NN.beyond"; none: all of the chapter.
        Raises ValueError for a row that was given before, and for a beginning that no claim of the chapter has.
        """
        rows = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
        found = [Flag(where=where, spoils=list(spoils), **row) for row in rows]
        known, every = [flag.name for flag in self.flags or []], [*claims(), f"{self.chapter[:2]}.beyond"]
        for flag in found:
            if flag.name in known:
                raise ValueError(f"rows: {flag.name!r} was flagged before")
            known.append(flag.name)
        for start in spoils:
            if not start.startswith(self.chapter[:2]) or not any(id.startswith(start) for id in every):
                raise ValueError(f"spoils: no claim of {self.chapter} begins with {start!r}")
        self.flags = [*(self.flags or []), *found]
        return pd.DataFrame([flag.model_dump(exclude={"where", "spoils"}) for flag in found])

    def raised(self, id: str | None = None) -> list[Flag]:
        """Return the flags that did not pass, of one claim or all; the profile smoke judges nothing and has none."""
        found = [] if self.profile == "smoke" else self.flags or []
        return [flag for flag in found if not flag.passed and (id is None or flag.touches(id))]

    def table(self, name: str, rows: Iterable[Mapping]) -> None:
        """Add a table: one dictionary a row, of strings, finite numbers, truth values or None."""
        self.tables = {**self.tables, name: [
            {key: cell.item() if isinstance(cell, np.generic) else cell for key, cell in row.items()} for row in rows]}

    def curve(self, name: str, x, series: Mapping) -> None:
        """Add curves over `x`, of shape (points,). Each series has shape (seeds, points), or (points,) for one seed."""
        self.curves = {**self.curves, name: Curve(x=np.asarray(x, float).tolist(), series={
            label: np.atleast_2d(np.asarray(runs, float)).tolist() for label, runs in series.items()})}

    def save(self, folder: str | Path | None = None) -> Path:
        """Write the record to <`folder` or `files.output()`>/results/<chapter>/<profile>.json and return that path.

        Raises ValueError when the profile is "paper" and a claim of the chapter is missing.
        """
        missing = {id for id in claims() if id[:2] == self.chapter[:2]} - {outcome.id for outcome in self.claims}
        if missing and self.profile == "paper":
            raise ValueError(f"claims: {self.chapter} lacks {', '.join(sorted(missing))}")
        self.provenance.device = _device()  # once more, now that TensorFlow is there to name a GPU
        seconds = (datetime.now(UTC) - datetime.fromisoformat(self.created)).total_seconds() + earlier_seconds()
        self.provenance.seconds, self.provenance.units = round(seconds, 1), taken()
        checked = self.model_validate(self.model_dump())  # lists may have been changed in place
        path = Path(folder or files.output()) / "results" / self.chapter / f"{self.profile}.json"
        with files.atomic(path) as temporary:
            temporary.write_text(checked.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Return the record in a file. Raises ValueError when it does not follow the schema."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def judged_again(self) -> "Record":
        """Return the same record with the verdicts on numbers that today's rules give to its values."""
        every, again = claims(), self.model_copy(deep=True)
        for outcome in again.claims:
            claim = every[outcome.id]
            if claim.kind == "number" and outcome.ours and outcome.verdict != "not-testable":
                parts = outcome.ours if isinstance(outcome.ours, dict) else {"": outcome.ours}
                papers = claim.value if isinstance(claim.value, dict) else {"": claim.value}
                direction = outcome.verdict != "not-reproduced"  # what was reproduced had the paper's sign
                ranks = [_judge(claim, parts[part], papers[part], direction, False) for part in parts]
                outcome.verdict = max(ranks, key=_VERDICTS.index)
        return again

    def comparison(self) -> pd.DataFrame:
        """Return `compare` of this record's claims."""
        return compare({outcome.id: outcome for outcome in self.claims},
                       {outcome.id: self.raised(outcome.id) for outcome in self.claims})


def _measure(values):
    values = np.atleast_1d(np.asarray(values, float))
    if values.ndim > 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values: got {values.tolist()}, expected one finite number a seed")
    return Measurement(mean=values.mean().item(), sd=values.std(ddof=1).item() if values.size > 1 else 0.0,
                       n=values.size, values=values.tolist())


def _judge(claim, ours, paper, direction, choice_tie):
    """Return the verdict on one measurement; `Record.claim` and claims.yml state the rules."""
    if claim.kind == "shown":
        if direction is None:
            raise ValueError(f"direction: {claim.id!r} is of kind 'shown', expected True or False")
        return "reproduced" if direction else "not-reproduced"
    if claim.kind == "choice":
        return "reproduced" if choice_tie or np.allclose(ours.values, paper) else "not-reproduced"
    if claim.kind == "order":
        sure = ours.n >= 2 and ours.mean > 2 * ours.error
        return "not-reproduced" if ours.mean <= 0 else "reproduced" if sure else "direction"
    off, substituted = _off(ours.mean, paper), claim.id[:2] in _SUBSTITUTED
    if claim.rate and not paper / _FACTOR < ours.mean < paper * _FACTOR:
        direction = False
    if off <= claim.tolerance:
        return "direction" if substituted else "reproduced"
    if substituted and direction:  # which is the most that it can be
        return "direction"
    if off <= claim.tolerance + 2 * ours.error:
        return "undecided"
    return "direction" if direction else "not-reproduced"


def _distance(claim, ours, paper):
    """How far a number is from the paper's, and for an undecided one how sure that is."""
    off, where = _off(ours.mean, paper), " on other data than the paper's" if claim.id[:2] in _SUBSTITUTED else ""
    text = f"off by {max(off, 0):.3g}{where}, tolerance {claim.tolerance:g}"
    if not claim.tolerance < off <= claim.tolerance + 2 * ours.error:
        return text
    near = sum(_off(value, paper) <= claim.tolerance for value in ours.values)
    return (f"{text}, two standard errors {2 * ours.error:.3g}; "
            f"{near or 'none'} of the {ours.n} seeds within the tolerance")


def _off(value, paper):
    return abs(value - paper) - 1e-9  # 0.9892 - 0.9852 is a little more than 0.004 in binary


def _revision():
    root, git = _PACKAGE.parents[1], shutil.which("git")
    # else installed, perhaps in the environment of another project, or a download unpacked within a repository
    if git and (root / "book/claims.yml").exists() and (root / ".git").exists():
        command = [git, "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
        made_by = ["src", "notebooks", "book/claims.yml"]
        found = subprocess.run([*command, *made_by], cwd=root, capture_output=True, text=True).stdout.splitlines()
        if found:
            return found[0].split()[-1], any(not line.startswith("#") for line in found)
    return f"v{__version__}", None


def _device():
    tf = sys.modules.get("tensorflow")
    for gpu in tf.config.list_physical_devices("GPU") if tf else []:
        return tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return model[1] if model else platform.processor() or platform.machine()
