"""Result records: what we found for each claim, flags, tables and curves of one run, and where they came from."""

import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from joblib import cpu_count
from pydantic import Field, NonNegativeInt, model_validator

from helpers import files, provenance
from helpers.checks import known
from helpers.profiles import PROFILES
from helpers.units import PACKAGES, at_once, earlier_seconds, taken, versions
from helpers.verdicts import WITHDRAWN, Finite, Outcome, Strict, Verdict, claims, compare, judge, measured

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Source(Strict):
    """Where a data set came from, and how much of it was used."""

    source: Literal["mirror", "cache", "download", "embedded"]
    sha256: Sha256
    n_train: NonNegativeInt
    n_test: NonNegativeInt


class Provenance(Strict):
    """What made the numbers; outside a checkout `commit` is the version of the helpers and `dirty` None.

    helpers, helpers_sha256 : the modules of helpers that the chapter had loaded, and the SHA-256 of their source; in
    records from before they were told apart, of all.
    units, processes : seconds of each unit by function, longest first, and how many were computed at the same time;
    records from before they were kept have none.
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
    processes: dict[str, int] | None = None
    datasets: dict[str, Source]


class Curve(Strict):
    """For each series one list a seed, with a value for each of `x`."""

    x: list[Finite]
    series: dict[str, list[list[Finite]]]

    @model_validator(mode="after")
    def _matches_x(self):
        for name, runs in self.series.items():
            if {len(run) for run in runs} != {len(self.x)}:
                raise ValueError(f"series {name!r}: got {[*map(len, runs)]} values, expected {len(self.x)} each")
        return self


class Flag(Strict):
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


class Record(Strict):
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
        commit, dirty = provenance.revision()
        names = provenance.loaded()
        return cls(chapter=chapter, profile=profile, created=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", provenance={
            "commit": commit, "dirty": dirty, "helpers": names, "helpers_sha256": provenance.helpers_sha256(names),
            "python": platform.python_version(), "device": provenance.device(), "cpu_count": cpu_count(),
            "seconds": 0.0, "packages": versions(*PACKAGES), "datasets": dict(datasets)})

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
        wanted = claim.by_column(columns)
        if values is not None and (not parts or parts.keys() != wanted.keys()):
            raise ValueError(f"values: got {sorted(parts)}, expected the columns {sorted(wanted)} of {id!r}")
        ours = {part: measured(seeds) for part, seeds in parts.items()}
        found = judge(claim, ours, direction, choice_tie)
        verdict = "not-testable" if self.profile == "smoke" else found  # which is never a reproduction
        self.claims.append(Outcome(id=id, ours=ours.get("", ours or None), note=note, verdict=verdict))
        return verdict

    def flag(self, where: str, rows: Iterable[Mapping] | pd.DataFrame, spoils: Iterable[str] = ()) -> pd.DataFrame:
        """Add rows of `helpers.flags`, checked on `where` (a network, an attack, a data set), and return their table.

        `spoils`: beginnings of the ids whose numbers hang on them, or "NN.beyond"; none: all of the chapter.
        Raises ValueError for a row that was given before, and for a beginning that no claim of the chapter has.
        """
        rows, spoils = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows, list(spoils)
        found = [Flag(where=where, spoils=spoils, **row) for row in rows]
        names, every = [flag.name for flag in self.flags or []], [*claims(), f"{self.chapter[:2]}.beyond"]
        for flag in found:
            if flag.name in names:
                raise ValueError(f"rows: {flag.name!r} was flagged before")
            names.append(flag.name)
        for start in spoils:
            if not start.startswith(self.chapter[:2]) or not any(id.startswith(start) for id in every):
                raise ValueError(f"spoils: no claim of {self.chapter} begins with {start!r}")
        self.flags = [*(self.flags or []), *found]
        return pd.DataFrame([flag.model_dump(exclude={"where", "spoils"}) for flag in found])

    def raised(self, id: str | None = None) -> list[Flag]:
        """Return the flags that did not pass, of one claim or all; the profile smoke judges nothing and has none."""
        return [flag for flag in self._judged_flags() if not flag.passed and (id is None or flag.touches(id))]

    def beyond(self) -> list[Flag]:
        """Return the flags that passed by their interval alone: the measured value lies beyond the limit."""
        clear = {">=": np.greater_equal, "<=": np.less_equal}
        return [flag for flag in self._judged_flags()
                if flag.passed and not clear[flag.relation](flag.measured, flag.limit)]

    def _judged_flags(self):
        return [] if self.profile == "smoke" else self.flags or []

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
        self.provenance.device = provenance.device()  # once more, now that TensorFlow is there to name a GPU
        seconds = (datetime.now(UTC) - datetime.fromisoformat(self.created)).total_seconds() + earlier_seconds()
        self.provenance.seconds, self.provenance.units = round(seconds, 1), taken()
        self.provenance.processes = at_once()
        checked = self.model_validate(self.model_dump())  # lists may have been changed in place
        path = Path(folder or files.output()) / "results" / self.chapter / f"{self.profile}.json"
        with files.atomic(path) as temporary:
            temporary.write_text(checked.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Record":
        """Return the record in a file. Raises ValueError when it does not follow the schema."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))

    def judged_again(self, withdrawn: Iterable[str] = ()) -> "Record":
        """Return the same record with the verdicts on numbers that today's rules give to its values.

        `withdrawn`: beginnings of the ids of claims on which this run is known to be wrong; they keep their values.
        """
        every, again, fallen = claims(), self.model_copy(deep=True), tuple(withdrawn)
        for outcome in again.claims:
            claim = every[known(f"{self.chapter}'s record: id", outcome.id, every)]
            if claim.kind == "number" and outcome.ours and outcome.verdict != "not-testable":
                parts = outcome.ours if isinstance(outcome.ours, dict) else {"": outcome.ours}
                direction = outcome.verdict != "not-reproduced"  # what was reproduced had the paper's sign
                outcome.verdict = judge(claim, parts, direction)
            if outcome.id.startswith(fallen):
                outcome.note = f"{outcome.verdict} by this run; its errata say why that is withdrawn. {outcome.note}"
                outcome.verdict = WITHDRAWN
        return again

    def comparison(self, repeat: bool = False) -> pd.DataFrame:
        """Return `compare` of this record's claims; what columns share is in the first row, or in all."""
        frame = compare({outcome.id: outcome for outcome in self.claims},
                        {outcome.id: self.raised(outcome.id) for outcome in self.claims})
        if not repeat:
            every, later = claims(), frame.duplicated("Claim")
            frame.loc[(frame[["Claim", "Note"]] == frame[["Claim", "Note"]].shift()).all(axis=1), "Note"] = ""
            frame.loc[later, "What"] = [what.removeprefix(f"{every[id].what or every[id].where}: ")
                                        for id, what in frame.loc[later, ["Claim", "What"]].itertuples(index=False)]
            frame.loc[later, ["Claim", "Verdict"]] = ""
        return frame
