"""A reader's own defence against the book's attacks: opened from a file, evaluated, and told in plain words."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import jinja2
import keras
import numpy as np
import pandas as pd

from helpers import data, evaluation, figures, files, flags
from helpers.defence import answers, as_defence
from helpers.models import randomised
from helpers.threat import ThreatModel

MEANING = {  # start of a flag's name: what it means where it is raised, and what to try
    "images with the same answer": "One image gets two answers. Say `randomised = True`: draws are averaged.",
    "answers after the evaluation": "The defence answers otherwise than before it was attacked: it keeps something "
        "from call to call. Make each answer depend on the image alone.",
    "clean images refused": "It refuses most images that nobody attacked: what is left of it is of no use. Choose its "
        "threshold on clean validation images.",
    "clean images right": "It is no better than guessing without an attack. Is it trained on this data, with pixels in "
        "[0, 1] and these classes?",
    "success at eps": "The attack wins more often in half the ball than in the whole one, which holds that half: it is "
        "too weak. More steps, other losses, another path.",
    "success at the largest eps": "With every valid image allowed, some images still stand: the attack cannot follow "
        "the gradient. Add a path with a gradient (BPDA).",
    "PGD less a single step": "One step does more than many: the loss is bent around the image (gradient masking).",
    "twice the steps": "Longer attacks go on winning: what is left is not settled. Take more steps.",
    "PGD less random noise": "The attack does no more than noise of the same size: it does nothing.",
    "PGD less no attack": "The attack does nothing.",
    "PGD less the smallest change": "A search for the smallest change wins where PGD does not: gradients near the "
        "image mislead. The number to quote is the worst case of both.",
    "PGD at eps / 2 less the smallest": "At half the radius a search for the smallest change wins where PGD does not: "
        "a curve over eps by PGD alone is too high there.",
    "PGD less a gradient-free": "Random search does more than the gradient: the gradient is masked. Add a path without "
        "what masks it (BPDA).",
    "the whole set less PGD": "Plain PGD wins more often than the set of attacks that was used: the set is too weak.",
    "white box less transfer": "Images made against another network do more than its own gradient, which is masked.",
    "images with a gradient": "The loss has no gradient on many images: a step without derivative, or a softmax that "
        "saturates. Add a path that replaces it (BPDA).",
    "images on a kink": "Many images lie on a kink of a ReLU or a maximum, where a gradient says little.",
    "images off a kink": "The gradient is not that of the function: a stopped or replaced gradient on this path.",
    "binarization test: success of the attack": "An adversarial image that was planted in the ball is not found: the "
        "attack is too weak for this defence, and what is left is not to be quoted.",
    "binarization test: success of random": "Chance finds the planted images: this test asks too little here.",
    "indicator: unavailable gradients": "Half of the attack's gradients are zero or not finite.",
    "indicator: unstable": "A little noise changes the loss by much: average over draws (`defence.Mean`).",
    "indicator: silent": "The attack passed a win and gave back another image.",
    "indicator: incomplete": "The attack was still gaining when it stopped: more steps.",
    "indicator: transfer failure": "The attack wins on its path and not on what is deployed: a path nearer to it.",
    "indicator: unconstrained": "With every valid image allowed the attack still fails.",
}


class ArenaError(Exception):
    """A defence that cannot be evaluated; the message says which, why, and what was expected."""


def opened(path):
    """The defence of a file: a Keras network, .keras, or what `defence()` of a Python file gives.

    Raises ArenaError for another file, a missing `defence`, or one that raises. A Python file is executed: it is the
    reader's own.
    """
    path = Path(path)
    if path.suffix == ".keras":
        try:
            return as_defence(keras.saving.load_model(path, compile=False, safe_mode=True))
        except Exception as error:  # Keras raises many kinds for a file that is none
            raise ArenaError(f"{path}: no network of Keras ({error})") from error
    if path.suffix != ".py":
        raise ArenaError(f"{path}: expected a Python file with a function `defence`, or a network saved as .keras")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "defence", None)):
            raise ArenaError(f"{path}: no function `defence`; expected one without arguments that gives a Keras "
                             "network, a function from images to logits, or a defence of three members")
        return as_defence(module.defence())
    except ArenaError:
        raise
    except Exception as error:
        line = _line_in(error, path)
        raise ArenaError(f"{path}{line}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)


def _line_in(error, path):
    """", line n", the last one of the file that is on the way to the error."""
    trace, found = error.__traceback__, ""
    while trace:
        if Path(trace.tb_frame.f_code.co_filename).resolve() == path.resolve():
            found = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


@dataclass(frozen=True)
class Entry:
    """A defence that was examined: its report, and what is shown of it."""

    name: str
    dataset: data.Dataset
    threat: ThreatModel
    report: evaluation.Report
    grid: list
    curve: np.ndarray

    def summary(self):
        """Everything as plain values, for JSON."""
        found = self.report
        interval = flags.share("left", found.outcomes != 2, 0.0)
        return {
            "defence": self.name, "data": self.dataset.name, "data_sha256": self.dataset.sha256,
            "norm": self.threat.norm, "eps": self.threat.eps, "images": len(found.clean), "sound": found.sound,
            "left": found.left, "left_low": interval["low"], "left_high": interval["high"],
            "clean": evaluation.rates(found.clean), "attacked": evaluation.rates(found.outcomes),
            "attacks": found.attacks.to_dict("records"), "flags": found.flags.to_dict("records"),
            "curve": {"eps": list(self.grid), "left": self.curve.mean(axis=1).tolist()},
        }


def examine(defence, dataset, threat, *, name="defence", images=200, seed=0, label=None):
    """Evaluate `defence` on the first `images` test images of `dataset`, of all that is known to be wrong first.

    label : text of the progress bar; None shows none. Returns an `Entry`.
    Raises ArenaError where the defence answers to no images of this data as one should.
    """
    x, y = dataset.x_test[:images], dataset.y_test[:images]
    try:
        defence = as_defence(defence)
        before = answers(defence, x)
    except Exception as error:
        raise ArenaError(f"{name}: {error}") from error
    if (classes := before.logits.shape[1]) != len(dataset.class_names):
        raise ArenaError(f"{name}: answers with {classes} classes; expected {len(dataset.class_names)}, those of "
                         f"{dataset.name}")
    found = evaluation.evaluate(defence, x, y, threat, label=label, seed=seed)
    extra = [flags.share("clean images refused", found.clean == 1, 0.5, "<="),
             flags.share("clean images right", found.clean == 0, 1.5 / classes)]
    if not randomised(defence):
        after = answers(defence, x)
        same = np.isclose(before.logits, after.logits, rtol=1e-3, atol=1e-3).all(axis=1)
        extra.append(flags.share("answers after the evaluation as before it", same, 1.0))
    report = evaluation.Report(found.clean, found.outcomes, found.found, found.attacks,
                               pd.concat([found.flags, pd.DataFrame(extra)], ignore_index=True))
    grid = [0.0, *(factor * threat.eps for factor in (0.25, 0.5, 0.75, 1.0))]
    some = slice(0, min(len(x), 100))
    curve = evaluation.survivors(defence, grid, x[some], y[some], norm=threat.norm, seed=seed, steps=20, restarts=2,
                                 losses=("margin", "cross-entropy"),
                                 path=list(defence.paths(seed).values())[-1])
    curve[-1] &= report.outcomes[some] != 2  # at eps the whole set has been tried
    return Entry(name, dataset, threat, report, grid, curve)


def advice(check):
    """What a raised flag means and what to try, in a sentence or two."""
    return next((text for start, text in MEANING.items() if check.startswith(start)), "")


def write(entry, folder):
    """Write <name>.json and <name>.html, a page that needs nothing else, to `folder`; return their paths."""
    paths = [Path(folder) / f"{entry.name}.{kind}" for kind in ("json", "html")]
    template = jinja2.Template(Path(__file__).with_name("arena.html.jinja").read_text("utf-8"), autoescape=True)
    rows = entry.report.flags.assign(advice=[advice(check) for check in entry.report.flags["check"]])
    summary = entry.summary()
    page = template.render(entry=summary, flags=rows.to_dict("records"), pictures=_pictures(entry))
    for path, text in zip(paths, (json.dumps(summary, indent=1, ensure_ascii=False), page), strict=True):
        with files.atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def _pictures(entry):
    """(PNG as base64, alternative text, caption) of some attacked images and of the curve."""
    found, pictures = entry.report.found, []
    won = np.flatnonzero((entry.report.clean == 0) & (entry.report.outcomes == 2))[:8]
    if won.size:
        x, names = entry.dataset.x_test, entry.dataset.class_names
        titles = [*(names[k] for k in entry.dataset.y_test[won]), *[""] * len(won)]
        grid = figures.digit_grid([*x[won], *found.images[won]], titles, columns=len(won), size=1.2)
        pictures.append((figures.png(grid), f"{len(won)} test images, and below them the images that evade the defence",
                         "Images that are right (top), and the worst that the attacks made of them (bottom)."))
    left = entry.curve.mean(axis=1)
    curve = figures.security_curve(entry.grid, {"PGD": left[None]}, ylabel="right or refused")
    pictures.append((figures.png(curve), f"From {left[0]:.0%} without an attack to {left[-1]:.0%} at ε = "
                     f"{entry.threat.eps:g}", "What is left by ε under PGD on the last path, and at the largest ε "
                     f"under all attacks of the table; one seed, {entry.curve.shape[1]} images."))
    return pictures
