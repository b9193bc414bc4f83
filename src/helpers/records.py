"""Result records: the papers' claims, what we found for each, the verdict, and where the numbers came from."""

import difflib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from helpers import __version__, files
from helpers.units import versions

Verdict = Literal["reproduced", "direction", "not-reproduced", "not-testable"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
_PACKAGES = ("numpy", "scipy", "scikit-learn", "tensorflow", "keras")
_SUBSTITUTES = ("05",)  # papers whose data is not public: on other data a number can at best agree in direction


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Claim(_Strict):
    """A number or a checkable statement of a paper; `value` is a dictionary where the paper gives several columns."""

    id: Annotated[str, Field(pattern=r"^\d\d\.[\w.]+$")]
    where: str
    what: str = ""
    kind: Literal["number", "order", "choice", "shown"]
    value: Finite | dict[str, Finite] | None
    tolerance: Annotated[Finite, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _number_is_complete(self):
        if self.kind == "number" and (self.value is None or self.tolerance is None):
            raise ValueError(f"{self.id}: a number needs a value and a tolerance")
        return self


class Measurement(_Strict):
    """Our value of a claim: one number a seed, their mean and sample standard deviation (0 for a single one)."""

    mean: Finite
    sd: Finite
    n: Count
    values: Annotated[list[Finite], Field(min_length=1)]

    @classmethod
    def of(cls, values) -> "Measurement":
        """Return the measurement of a number or a sequence of numbers, one a seed."""
        values = np.atleast_1d(np.asarray(values, float))
        return cls(mean=float(values.mean()), sd=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
                   n=len(values), values=values.tolist())

    def __str__(self):
        return f"{self.mean:.4g} ± {self.sd:.2g} (n = {self.n})" if self.n > 1 else f"{self.mean:.4g} (n = 1)"


class Outcome(_Strict):
    """What we found for one claim."""

    id: str
    ours: Measurement | dict[str, Measurement] | None
    verdict: Verdict
    note: str


class Source(_Strict):
    """Where a data set came from and how much of it was used."""

    source: Literal["mirror", "cache", "download", "embedded"]
    sha256: Sha256
    n_train: Count
    n_test: Count


class Provenance(_Strict):
    """What the numbers were made with; `dirty` is None where the helpers do not run from a checkout."""

    commit: str
    dirty: bool | None
    helpers_sha256: Sha256
    python: str
    packages: dict[str, str]
    device: str
    cpu_count: int
    seconds: Finite
    datasets: dict[str, Source]


class Curve(_Strict):
    """Values over `x`, one list a seed for each series."""

    x: list[Finite]
    series: dict[str, list[list[Finite]]]

    @model_validator(mode="after")
    def _same_length(self):
        for name, runs in self.series.items():
            if any(len(run) != len(self.x) for run in runs):
                raise ValueError(f"series {name!r}: got {[len(run) for run in runs]} values, expected {len(self.x)}")
        return self


def verdict(claim: Claim, ours, direction: bool | None = None, choice_tie: bool = False) -> Verdict:
    """Return what `ours`, a measurement or a dictionary of them, says about `claim`: the worst over its columns."""
    if ours is None:
        return "not-testable"
    if (direction is not None) != (claim.kind == "shown") and claim.kind != "number":
        raise ValueError(f"direction: got {direction} for {claim.id}, a claim of kind {claim.kind!r}")
    if choice_tie and claim.kind != "choice":
        raise ValueError(f"choice_tie: {claim.id} is of kind {claim.kind!r}, expected 'choice'")
    parts = ours if isinstance(ours, dict) else {"": ours}
    papers = claim.value if isinstance(claim.value, dict) else dict.fromkeys(parts, claim.value)
    if set(parts) != set(papers):
        raise ValueError(f"values: {claim.id} has the columns {sorted(papers)}, got {sorted(parts)}")
    ranks = [_rank(claim, part, papers[name], direction, choice_tie) for name, part in parts.items()]
    return ("reproduced", "direction", "not-reproduced")[max(ranks)]


def _rank(claim, ours, paper, direction, choice_tie):
    """Return 0 for reproduced, 1 for the direction only, 2 for neither."""
    if claim.kind == "shown":
        return 0 if direction else 2
    if claim.kind == "choice":
        return 0 if choice_tie or all(math.isclose(value, paper) for value in ours.values) else 2
    if claim.kind == "order":
        beyond = ours.n > 1 and ours.mean > 2 * ours.sd / math.sqrt(ours.n)
        return 2 if ours.mean <= 0 else 0 if beyond else 1
    margin = max(claim.tolerance, 2 * ours.sd if ours.n >= 3 else 0)
    if abs(ours.mean - paper) <= margin + 1e-9:  # 0.9892 - 0.9852 is a little more than 0.004 in binary
        return 1 if claim.id[:2] in _SUBSTITUTES else 0
    return 1 if direction else 2


def claims(path: str | Path | None = None) -> dict[str, Claim]:
    """Return the papers' claims by id, from `path` or the book's claims.yml."""
    here = Path(__file__).resolve()
    installed = here.with_name("claims.yml")
    path = path or (installed if installed.exists() else here.parents[2] / "book" / "claims.yml")
    found = [Claim.model_validate(claim) for claim in yaml.safe_load(Path(path).read_text(encoding="utf-8"))["claims"]]
    ids = [claim.id for claim in found]
    if twice := {name for name in ids if ids.count(name) > 1}:
        raise ValueError(f"{path}: these claims are there twice: {', '.join(sorted(twice))}")
    return dict(zip(ids, found, strict=True))


class Record(_Strict):
    """The results of one run of a chapter; see `start`, `claim`, `table`, `curve`, `save` and `load`."""

    chapter: Annotated[str, Field(pattern=r"^\d\d_\w+$")]
    profile: Literal["smoke", "quick", "paper"]
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    provenance: Provenance
    claims: list[Outcome] = []
    tables: dict[str, list[dict[str, str | bool | int | Finite | None]]] = {}
    curves: dict[str, Curve] = {}
    _started: float = PrivateAttr(default_factory=time.perf_counter)

    @classmethod
    def start(cls, chapter: str, profile: str, datasets: Mapping[str, Mapping]) -> "Record":
        """Return an empty record of `chapter` (its notebook's stem), with what runs it; the clock starts here."""
        package = Path(__file__).parent
        commit, dirty = _revision(package)
        provenance = {"commit": commit, "dirty": dirty, "helpers_sha256": _fingerprint(package),
                      "python": platform.python_version(), "packages": versions(*_PACKAGES), "device": _device(),
                      "cpu_count": os.cpu_count(), "seconds": 0.0, "datasets": dict(datasets)}
        return cls(chapter=chapter, profile=profile, created=_now(), provenance=provenance)

    def claim(self, id: str, values, note: str = "", direction: bool | None = None,
              choice_tie: bool = False) -> Verdict:
        """Add our `values` of a claim, one a seed, and return the verdict.

        number: a list, or a dictionary of lists where the paper gives columns; `direction` says whether the sign of
        the effect agrees. order: differences, positive where the statement holds. choice: what was selected;
        `choice_tie` says that the paper's choice is as good within one standard error. shown: `direction` says whether
        the statement holds. None where the claim cannot be tested, with a `note` that says why.
        Raises ValueError for an id that is unknown, of another chapter or given before, and for what its kind lacks.
        """
        known = claims()
        claim = known.get(id)
        if claim is None:
            near = difflib.get_close_matches(id, known, n=1)
            raise ValueError(f"id: unknown claim {id!r}" + (f", did you mean {near[0]!r}?" if near else ""))
        if id[:2] != self.chapter[:2]:
            raise ValueError(f"id: {id!r} is not a claim of {self.chapter}")
        if any(outcome.id == id for outcome in self.claims):
            raise ValueError(f"id: {id!r} was given before")
        if values is None and not note:
            raise ValueError(f"note: {id!r} has no values, expected a note that says why it cannot be tested")
        ours = None if values is None else {name: Measurement.of(v) for name, v in values.items()} if isinstance(
            values, Mapping) else Measurement.of(values)
        found = verdict(claim, ours, direction, choice_tie)
        found = "not-testable" if self.profile == "smoke" else found  # a smoke number is never a reproduction
        self.claims.append(Outcome(id=id, ours=ours, verdict=found, note=note))
        return self.claims[-1].verdict

    def table(self, name: str, rows: Iterable[Mapping]):
        """Add a table: one dictionary a row, of text, numbers, truth values or None."""
        rows = [{key: _plain(cell) for key, cell in row.items()} for row in rows]
        self.tables |= type(self).model_validate(self.model_dump() | {"tables": {name: rows}}).tables

    def curve(self, name: str, x, series: Mapping):
        """Add curves over `x`, shape (points,); each series has shape (points,) or (seeds, points)."""
        self.curves[name] = Curve(x=np.asarray(x, float).tolist(), series={
            label: np.atleast_2d(np.asarray(runs, float)).tolist() for label, runs in series.items()})

    def save(self, folder: str | Path | None = None) -> Path:
        """Write the record to `folder`/results/<chapter>/<profile>.json and return that path.

        `folder` is HELPERS_OUTPUT or _build where it is not given.
        Raises ValueError when a claim of the chapter is missing in the profile "paper".
        """
        missing = {id for id in claims() if id[:2] == self.chapter[:2]} - {outcome.id for outcome in self.claims}
        if self.profile == "paper" and missing:
            raise ValueError(f"claims: {self.chapter} has no values for {', '.join(sorted(missing))}")
        self.created, self.provenance.device = _now(), _device()
        self.provenance.seconds = round(time.perf_counter() - self._started, 1)
        content = type(self).model_validate(self.model_dump()).model_dump()  # lists may have been changed by hand
        path = Path(folder or os.environ.get("HELPERS_OUTPUT", "_build")) / "results" / self.chapter
        with files.atomic(path / f"{self.profile}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n",
                                 encoding="utf-8")
        return path / f"{self.profile}.json"

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Return the record in a file. Raises ValueError where it does not follow the schema."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def _repr_html_(self):
        with pd.option_context("display.max_colwidth", None):
            return self.comparison().to_html(index=False)

    def comparison(self) -> pd.DataFrame:
        """Return the paper's values beside ours, one row a claim and column of the paper."""
        rows, known = [], claims()
        for outcome in self.claims:
            claim = known[outcome.id]
            ours = outcome.ours if isinstance(outcome.ours, dict) else {"": outcome.ours}
            for part, measurement in ours.items():
                paper = claim.value.get(part) if isinstance(claim.value, dict) else claim.value
                rows.append({"Claim": claim.id, "What": ": ".join(filter(None, (claim.what or claim.where, part))),
                             "Paper": "–" if paper is None else f"{paper:g}", "Ours": str(measurement or "–"),
                             "Verdict": outcome.verdict, "Note": outcome.note})
        return pd.DataFrame(rows, columns=["Claim", "What", "Paper", "Ours", "Verdict", "Note"])


def _plain(value):
    return value.item() if isinstance(value, np.generic) else value


def _now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _fingerprint(package):
    """Return what `sha256sum *.py | sha256sum` prints in the folder of the helpers."""
    lines = (f"{files.sha256(path)}  {path.name}\n" for path in sorted(package.glob("*.py")))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _git(*arguments, at):
    try:
        return subprocess.run(["git", "--no-optional-locks", "-C", at, *arguments], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here, or no repository


def _revision(package):
    if not _git("ls-files", "--error-unmatch", "__init__.py", at=package):  # perhaps installed inside another project
        return f"v{__version__}", None
    changes = _git("status", "--porcelain", "--", ":/src", ":/notebooks", ":/book/claims.yml", at=package)
    return _git("rev-parse", "HEAD", at=package), bool(changes)


def _device():
    tf = sys.modules.get("tensorflow")
    for gpu in tf.config.list_physical_devices("GPU") if tf else ():
        return tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())
