"""Claims of the papers, what we measured for each, and the verdict."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, Field

_VERDICTS = ("reproduced", "undecided", "direction", "not-reproduced", "not-testable")  # from the best to the worst
WITHDRAWN = "withdrawn"  # what a run said is known to be wrong, and no other run has said more
VERDICTS = (*_VERDICTS, WITHDRAWN)
_FACTOR = 3  # a rate that is so many times the paper's, or a part of it, has not even its direction
Verdict = Literal[VERDICTS]
Finite = Annotated[float, Field(allow_inf_nan=False)]
_PACKAGE = Path(__file__).resolve().parent
_SUBSTITUTED = ("05",)  # papers whose data is not public: on other data a number can at best agree in direction


class Strict(BaseModel, strict=True, extra="forbid", validate_assignment=True):
    """A part of a record: no other fields, no conversion of types."""


class Claim(Strict):
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

    def by_column(self, columns: Iterable[str]) -> dict[str, float | None]:
        """Return the paper's value of each of its columns; of `columns` where the paper has one value, or none."""
        return self.value if isinstance(self.value, dict) else dict.fromkeys(columns, self.value)


class Measurement(Strict):
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


class Outcome(Strict):
    """What we found for a claim."""

    id: str
    ours: Measurement | dict[str, Measurement] | None
    verdict: Verdict
    note: str


def claims(path: str | Path | None = None) -> dict[str, Claim]:
    """Return the papers' claims by id, from `path` or the book's claims.yml."""
    path = path or next(filter(Path.exists, (_PACKAGE / "claims.yml", _PACKAGE.parents[1] / "book/claims.yml")))
    return dict(_claims(Path(path).read_text(encoding="utf-8")))


@lru_cache(1)  # a record asks for them at every claim and flag, and to read the text takes a tenth of a second
def _claims(text):
    return {claim["id"]: Claim.model_validate(claim) for claim in yaml.safe_load(text)["claims"]}


def compare(outcomes: Mapping[str, Outcome | None], raised: Mapping[str, Iterable] | None = None):
    """Return the papers' values beside ours (None: no record yet), as text: a row for each claim, or column of it.

    `raised`: the flags, by claim, that say that its evaluation is not sound; the note begins with them.
    """
    every, rows = claims(), []
    for id, outcome in outcomes.items():
        claim, ours = every[id], outcome.ours if outcome else None
        verdict, note = (outcome.verdict, outcome.note) if outcome else ("no record yet", "")
        parts = ours if isinstance(ours, dict) else {"": ours}
        doubt = "; ".join(f"NOT SOUND: {flag}" for flag in (raised or {}).get(id, []))
        tested = claim.kind == "number" and ours and verdict not in ("not-testable", WITHDRAWN)
        rows += [(id, ": ".join(filter(None, (claim.what or claim.where, part))),
                  "–" if paper is None else f"{paper:g}", _ours(claim, parts.get(part)), verdict,
                  "; ".join(filter(None, [doubt, _distance(claim, parts[part], paper) if tested else "", note])))
                 for part, paper in claim.by_column(parts).items()]
    return pd.DataFrame(rows, columns=["Claim", "What", "Paper", "Ours", "Verdict", "Note"])


def _ours(claim, ours):
    if ours and claim.kind == "choice":  # a mean of choices was never chosen
        return f"{' or '.join(f'{value:g}' for value in dict.fromkeys(ours.values))} (n = {ours.n})"
    return str(ours or "–")


def measured(values) -> Measurement:
    """Return the measurement of `values`, one a seed. Raises ValueError for none, and for one that is not finite."""
    values = np.atleast_1d(np.asarray(values, float))
    if values.ndim > 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values: got {values.tolist()}, expected one finite number a seed")
    return Measurement(mean=values.mean().item(), sd=values.std(ddof=1).item() if values.size > 1 else 0.0,
                       n=values.size, values=values.tolist())


def judge(claim: Claim, ours: Mapping[str, Measurement], direction: bool | None, choice_tie=False) -> Verdict:
    """Return the verdict on `ours`, measurements by column, of which the worst counts; `Record.claim` has the rules."""
    papers = claim.by_column(ours)
    found = [_judged(claim, ours[part], papers[part], direction, choice_tie) for part in ours]
    return max(found, key=_VERDICTS.index, default="not-testable")


def _judged(claim, ours, paper, direction, choice_tie):
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
    if substituted:  # of which that is the most, and which more seeds do not make the paper's
        return "direction" if direction else "not-reproduced"
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
            f"{near or 'none'} of the {ours.n} values within the tolerance")


def _off(value, paper):
    return abs(value - paper) - 1e-9  # 0.9892 - 0.9852 is a little more than 0.004 in binary
