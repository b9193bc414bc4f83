"""Profiles: the same chapter in three sizes, from a check in a minute to the paper's own."""

import difflib
from collections.abc import Mapping

PROFILES = ("smoke", "quick", "paper")


class Settings:
    """The settings of a run, read-only: `settings.epochs`, `settings._asdict()`; a notebook shows them as a table."""

    def __init__(self, profile: str, values: Mapping, overridden=()):
        vars(self).update(values, profile=profile, _overridden=tuple(overridden))

    def __setattr__(self, name, value):
        raise AttributeError(f"settings are read-only: to change {name!r}, give it in OVERRIDES")

    def _asdict(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_overridden"}

    def __repr__(self):
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self._asdict().items())})"

    def _repr_html_(self):
        import pandas as pd

        rows = [(name, repr(value), "override" if name in self._overridden else self.profile)
                for name, value in self._asdict().items() if name != "profile"]
        return pd.DataFrame(rows, columns=["Setting", "Value", "From"]).to_html(index=False)


def resolve(profile: str, table: Mapping[str, Mapping], overrides: Mapping | None = None) -> Settings:
    """Return the settings of `profile` in `table`, with `overrides` laid over them.

    `table` holds a dictionary of settings for each of `PROFILES`, all with the same keys. An override has the type that
    its setting has in one of the profiles; an int stands for a float.
    Raises ValueError for an unknown profile or key or an uneven table, TypeError for an override of the wrong type.
    """
    _known("profile", profile, PROFILES)
    if set(table) != set(PROFILES) or len({frozenset(settings) for settings in table.values()}) > 1:
        raise ValueError(f"table: expected the profiles {', '.join(PROFILES)}, each with the same keys, got "
                         f"{ {name: sorted(settings) for name, settings in table.items()} }")
    overrides, values = dict(overrides or {}), dict(table[profile])
    for name, value in overrides.items():
        _known("OVERRIDES", name, values)
        kinds = {type(settings[name]) for settings in table.values()}
        values[name] = float(value) if float in kinds and type(value) is int else value
        if type(values[name]) not in kinds and kinds != {type(None)}:
            raise TypeError(f"OVERRIDES: {name!r} got {value!r} ({type(value).__name__}), expected "
                            f"{' or '.join(sorted(kind.__name__ for kind in kinds))}")
    return Settings(profile, values, overrides)


def _known(argument, name, names):
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        raise ValueError(f"{argument}: unknown {name!r}" + (f", did you mean {near[0]!r}?" if near else "")
                         + f" Expected one of: {', '.join(names)}")
