"""The board: all defences of the arena's record side by side, as rows, a figure, and the place of another one."""

from pathlib import Path

import numpy as np

from helpers import figures, flags
from helpers.records import Record

CHAPTER, TABLE = "06_arena", "board"
COLUMNS = {  # of the table of the record, in the order of the downloads
    "defence": str, "chapter": str, "data": str, "norm": str, "eps": float, "images": int, "attacks": int,
    "clean": float, "refused": float, "ignored": float, "left": float, "left_low": float, "left_high": float,
    "certified": float, "sound": bool, "raised": str, "parameters": int, "milliseconds": float, "training": float}
NORMS = {"linf": "L∞", "l2": "L2"}
HOME = {  # start of a defence's name: the chapter that explains it
    "NR": "01_deep_neural_rejection", "DNR": "01_deep_neural_rejection", "gaussian": "03_blur_preprocessing",
    "median": "03_blur_preprocessing", "jpeg": "03_blur_preprocessing", "blur": "03_blur_preprocessing",
    "random blur": "03_blur_preprocessing", "detector": "04_uncertainty_and_closeness",
    "purifier": "05_autoencoder_purification", "smoothing": CHAPTER}
UNTESTED = "attack not tested: one image may get two answers"
OUTCOMES = {"correct": ("#7cc4e8", ""), "rejected": ("#f2d98d", "//"), "evaded": ("#ee9a6f", "xx")}


def home(name):
    """The chapter that explains the defence `name`: that on adversarial training for networks without more."""
    return next((page for start, page in HOME.items() if name.startswith(start)),
                "02_mixed_batch_adversarial_training")


def rows(record):
    """Rows of the board, sound ones first and the most that is left on top, threat by threat; none without a record."""
    found = [] if record is None else record.tables.get(TABLE, [])
    return sorted(found, key=lambda row: (row["data"], row["norm"] != "linf", row["eps"], not row["sound"],
                                          -row["left"]))


def raised(run):
    """Names of the checks that did not pass in `run`, the evaluation of one defence under one threat."""
    return [flag["check"] for flag in run["flags"] if not flag["passed"]]


def tested(flags):
    """Whether the attack itself was tested, by rows of `helpers.flags`: the tests are of one answer an image."""
    return any(flag["check"].startswith(("binarization", "indicator")) for flag in flags)


def row(name, data, limit, run, *, certified, parameters, training):
    """A row of the board.

    limit : (norm, eps). run : what an evaluation found: "clean" and "worst", indices of `evaluation.OUTCOMES` (n,);
    "ignored", which images withstand an attacker who ignores the defence, (n,) bool; "flags", rows of `helpers.flags`,
    none where it was not examined, and then it is not called sound; "attacks", how many the set has on each path;
    "milliseconds" an answer takes.
    certified : share, or None. parameters, training : numbers in all its parts, seconds that these took.
    """
    left, why = run["worst"] != 2, raised(run)
    note = "; ".join(why) or ("" if tested(run["flags"]) else UNTESTED)
    ends = flags.share("left", left, 0.0)
    values = [name, home(name), data, *limit, len(left), run["attacks"], np.mean(run["clean"] == 0),
              np.mean(run["clean"] == 1), np.mean(run["ignored"]), np.mean(left), ends["low"], ends["high"], certified,
              bool(run["flags"]) and not why, note if run["flags"] else "not examined", parameters,
              run["milliseconds"], training]
    return {column: value if value is None else kind(value) for (column, kind), value in zip(
        COLUMNS.items(), values, strict=True)}


def kept(root=None):
    """The rows of the record that the repository keeps; none where there is no record, or no repository."""
    path = Path(root or Path(__file__).parents[2], "book/results", CHAPTER, "paper.json")
    return rows(Record.load(path)) if path.exists() else []


def threat(row):
    """The threat of a row, or of what was examined, as text: "L∞, ε = 0.1"."""
    return f"{NORMS[row['norm']]}, ε = {row['eps']:g}"


def place(told, board):
    """Where a defence stands among the rows of the `board`, as a sentence; `told` is its `arena.Entry.summary()`."""
    if not board:
        return "The board has no record yet: there is nothing to compare it with."
    same = [row for row in board if row["data"] == told["data"] and threat(row) == threat(told)]
    if not same:
        known = sorted({f"{row['data']} at {threat(row)}" for row in board})
        return f"The board has no rows for {told['data']} at {threat(told)}; it has {'; '.join(known)}."
    sound = [row for row in same if row["sound"]]
    above = [row for row in sound if row["left"] > told["left"]]
    below = [row for row in sound if row["left"] <= told["left"]]
    text = f"On the board, {told['data']} at {threat(told)}, "
    if not told["sound"]:
        return (f"{text}it would be listed below the {len(sound)} sound defences, as one whose evaluation is not "
                f"sound; more than its {told['left']:.1%} is left of {len(above)} of them.")
    near = [f"below {_named(above[-1])}"] if above else []
    near += [f"above {_named(below[0])}"] if below else []
    return f"{text}it would stand at place {len(above) + 1} of {len(sound) + 1}: {' and '.join(near) or 'alone'}."


def _named(row):
    return f"{row['defence']} ({row['left']:.1%})"


def figure(board):
    """What is left of each defence (rows) under each threat (panels): an attacker who ignores it, and one who knows it.

    Unsound ones stand below the others, marked †. Without rows it says that there is no record yet.
    """
    threats = list(dict.fromkeys((row["data"], threat(row)) for row in board))
    if not board:
        ax = figures.subplots(1, 1, 7.2, 1.6, xticks=(), yticks=())[0, 0]
        ax.text(0.5, 0.5, "no record yet", ha="center", va="center", color=figures.FAINT, style="italic")
        return ax.figure
    doubted, met = {row["defence"] for row in board if not row["sound"]}, {}
    for row in board:
        met.setdefault(row["defence"], set()).add((row["data"], threat(row)))
    common = set.intersection(*met.values()) or set(threats)  # a mean over harder threats is no worse defence
    mean = {name: np.mean([row["left"] for row in board if row["defence"] == name
                           and (row["data"], threat(row)) in common]) for name in met}
    names = sorted(mean, key=lambda name: (name in doubted, -mean[name]))
    axes = figures.subplots(1, len(threats), 2.4 + 1.9 * len(threats), 1.6 + 0.32 * len(names))[0]
    for ax, (name, limit) in zip(axes, threats, strict=True):
        _panel(ax, {row["defence"]: row for row in board if (row["data"], threat(row)) == (name, limit)}, names)
        ax.set(title=f"{name}\n{limit}", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5), xlim=(-0.04, 1.04),
               yticklabels=[f"{each} †" if each in doubted else each for each in names] if ax is axes[0] else [])
        ax.xaxis.set_major_formatter("{x:.0%}")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return axes[0].figure


def _panel(ax, found, names):
    """Both ends of each defence that was `found` under one threat, in the rows `names`."""
    at = [i for i, name in enumerate(names) if name in found]
    ends = {key: [found[names[i]][key] for i in at] for key in ("ignored", "left", "left_low", "left_high")}
    ax.hlines(at, ends["left"], ends["ignored"], color=figures.FAINT, linewidth=1)
    ax.plot(ends["ignored"], at, "o", fillstyle="none", color=figures.KNOWLEDGE["unaware"],
            label="an attacker who ignores the defence")
    reach = np.abs(np.array([ends["left_low"], ends["left_high"]]) - ends["left"])
    ax.errorbar(ends["left"], at, xerr=reach, fmt="D", color=figures.KNOWLEDGE["informed"], markersize=4,
                label="all attacks, by one who knows it (99 % interval)")


def outcomes(shares):
    """Bars of what becomes of the images; `shares`: defence -> outcome -> share, which sum to 1."""
    ax, start = figures.subplots(1, 1, 8, 1.4 + 0.32 * len(shares))[0, 0], np.zeros(len(shares))
    for kind, (colour, hatch) in OUTCOMES.items():
        width = np.array([each[kind] for each in shares.values()])
        ax.barh(list(shares), width, left=start, color=colour, hatch=hatch, edgecolor=figures.FAINT, label=kind)
        start += width
    ax.set(xlim=(0, 1), xlabel="share of the images, at their worst", ylim=(len(shares) - 0.5, -0.5))
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.figure.legend(loc="outside lower center", ncols=3)
    return ax.figure
