"""Profiles: the same chapter in three sizes, from a check in a minute to the paper's own."""

import copy
from collections.abc import Mapping
from types import SimpleNamespace

from helpers.checks import known

PROFILES = ("smoke", "quick", "paper")


class Settings(SimpleNamespace):
    """The settings of a run, read-only: `settings.epochs`, `settings._asdict()`; a notebook shows them as a table."""

    def __setattr__(self, name, value):
        raise AttributeError(f"settings are read-only: give {name!r} in OVERRIDES instead")

    def _asdict(self):
        return dict(vars(self))

    def _repr_html_(self):
        rows = (f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in vars(self).items())
        return f"<table><tr><th>setting</th><th>value</th></tr>{''.join(rows)}</table>"


def resolve(profile: str, table: Mapping[str, Mapping], overrides: Mapping | None = None) -> Settings:
    """Return the settings that `table` holds for `profile`, with `overrides` laid over them.

    All of `PROFILES` are in `table`, with the same keys. An override has the type that its setting has in one of the
    profiles (and so have the items of a list); an int also stands for a float.
    Raises ValueError for an unknown profile or key or an uneven table, TypeError for an override of the wrong type.
    """
    known("profile", profile, PROFILES)
    if set(table) != set(PROFILES) or len({frozenset(values) for values in table.values()}) > 1:
        raise ValueError(f"table: expected the same keys in {PROFILES}, got {({k: list(v) for k, v in table.items()})}")
    for name, value in (overrides or {}).items():
        examples = [table[each][known("OVERRIDES", name, table[profile])] for each in PROFILES]
        items = [item for example in examples if isinstance(example, list) for item in example]
        inside = [(item, items) for item in value] if isinstance(value, list) else []
        for given, like in [(value, examples), *inside]:
            kinds = {type(example).__name__ for example in like}
            if kinds and type(given).__name__ not in kinds | ({"int"} if "float" in kinds else set()):
                raise TypeError(f"OVERRIDES: {name!r} got {given!r}, expected {' or '.join(sorted(kinds))}")
    return Settings(profile=profile, **copy.deepcopy({**table[profile], **(overrides or {})}))
