"""What the arena found of one defence, in plain words: lines for a terminal, JSON, and a page that needs no other."""

import json
from pathlib import Path

import jinja2
import numpy as np

from helpers import evaluation, figures, files
from helpers.board import NORMS, tested

MEANING = {  # start of a flag's name: what it asks, and what to try where it is raised
    "images with the same answer": (
        "Does one image get one answer?", "Say `randomised = True`: draws are averaged."),
    "answers to an image alone": (
        "Does an answer hang on the image alone?",
        "It changes with the other images of the batch: switch batch statistics off (`training=False`)."),
    "answers after the evaluation": (
        "Does the defence answer as it did before it was attacked?",
        "It keeps something from call to call, such as weights or batch statistics: make each answer depend on the "
        "image alone."),
    "clean images refused": (
        "Are most images that nobody attacked answered?",
        "What is left of a defence that refuses all is all, and of no use. Choose its threshold on clean validation "
        "images, for a false-reject rate of a few per cent."),
    "clean images right": (
        "Is it better than guessing without an attack?",
        "Train it on this data: pixels in [0, 1], channels last, the classes in this order."),
    "success at eps": (
        "Does the attack win at least as often in the whole ball as in half of it?",
        "The whole holds the half, so the attack is too weak: more steps, other losses, another path."),
    "success at the largest eps": (
        "Does the attack win where every valid image is allowed?",
        "It cannot follow the gradient. Add a path with one (BPDA)."),
    "PGD less a single step": (
        "Do many steps do at least as much as one?",
        "The loss is bent around the image (gradient masking): add a path that leaves out what bends it."),
    "twice the steps": (
        "Is the attack done?", "Longer attacks go on winning: what is left is not settled. Take more steps."),
    "PGD less random noise": (
        "Does the attack do more than noise of its size?", "It finds nothing that chance does not: add a path."),
    "PGD less no attack": ("Does the attack do anything?", "It does not: add a path with a gradient."),
    "PGD less the smallest change": (
        "Does PGD win wherever a search for the smallest change does?",
        "Gradients near the image mislead. The number to quote is the worst case of both, or a lower one."),
    "PGD at eps / 2 less the smallest": (
        "Is the same so at half the radius?", "A curve over eps by PGD alone is too high there."),
    "PGD less a gradient-free": (
        "Does the gradient do at least as much as random search?",
        "The gradient is masked. Add a path without what masks it (BPDA)."),
    "the whole set less PGD": (
        "Is the set of attacks as strong as PGD alone?", "It is too weak: use the standard set."),
    "white box less transfer": (
        "Does its own gradient do at least as much as another network's?",
        "The gradient is masked. Add a path without what masks it (BPDA)."),
    "images with a gradient": (
        "Is there a gradient to follow?",
        "A step without derivative, a way through NumPy, or a softmax that saturates. Add a path that replaces it "
        "(BPDA): the same on the way there, something smooth on the way back."),
    "images on a kink": (
        "Is the loss smooth where the images are?",
        "Many lie on a kink of a ReLU or a maximum, where a gradient says little. Attack from random starts."),
    "images off a kink": (
        "Is the gradient that of the function?",
        "It is not: a stopped or replaced gradient on this path. Look where it is stopped."),
    "binarization test: a readout": (
        "Can the attack be tried on an adversarial image that is known to exist?",
        "Features on this path do not tell images apart (votes, a constant): it is not known whether the attack could "
        "have found anything. Add a path with features that vary."),
    "binarization test: success of the attack": (
        "Does the attack find an adversarial image that was planted in the ball?",
        "It is too weak for this defence, and what is left is not to be quoted. Add a path that it can follow."),
    "binarization test: success of random": (
        "Is the planted image hard to find by chance?", "This test asks too little here, and proves nothing."),
    "indicators of attack failure": (
        "Could the six signs of a failing attack be read?",
        "All of the examined images are wrong without an attack, or gradients are not finite."),
    "indicator: unavailable gradients": (
        "Are the attack's gradients there?", "Half of them are zero or not finite. Add a path that replaces them."),
    "indicator: unstable": (
        "Does the loss change little under a little noise?",
        "It changes by much: average over draws (`defence.Mean`)."),
    "indicator: silent": (
        "Does the attack give back what won?", "It passed a win and gave back another image: keep the best one."),
    "indicator: incomplete": (
        "Had the attack stopped rising when it ended?", "It was still gaining: more steps."),
    "indicator: transfer failure": (
        "Does what wins on the path win on what is deployed?", "The path is too far from it: add a nearer one."),
    "indicator: unconstrained": (
        "Does the attack win where every valid image is allowed?", "It cannot follow the gradient on its path."),
}


def asks(check):
    """What a flag asks, as a question; empty where nothing is known of it."""
    return _about(check)[0]


UNTESTED = ("The binarization test and the indicators of attack failure were not made: they are of one answer an "
            "image, and this defence says that it may give two. Read the number with more care.")


def advice(check):
    """What to try where a flag is raised, in a sentence or two."""
    return _about(check)[1]


def _about(check):
    return next((texts for start, texts in MEANING.items() if check.startswith(start)), ("", ""))


def lines(entry, place=""):
    """What is printed: outcomes, attacks, raised flags with what to try, what is left and whether it may be quoted."""
    told = entry.summary()
    yield f"\n{'':16}" + "".join(f"{name:>10}" for name in evaluation.OUTCOMES)
    for name, shares in (("as they are", told["clean"]), ("at their worst", told["attacked"])):
        yield f"{name:16}" + "".join(f"{share:>10.1%}" for share in shares.values())
    yield f"\n{entry.report.attacks.to_string(index=False)}\n"
    raised = [flag for flag in told["flags"] if not flag["passed"]]
    for flag in raised:
        yield (f"RAISED {flag['check']}: {flag['measured']:.3f}, limit {flag['relation']} {flag['limit']:g}. "
               f"{asks(flag['check'])} No. {advice(flag['check'])}")
    yield (f"{told['left']:.1%} of {told['images']} images are left ({told['left_low']:.1%} to "
           f"{told['left_high']:.1%}, 99 % interval) on {told['data']} at {told['norm']}, eps {told['eps']:g}"
           + (f": NOT SOUND, {len(raised)} of {len(told['flags'])} flags raised, not to be quoted" if raised
              else f": sound, {len(told['flags'])} checks passed"))
    if not tested(told["flags"]):
        yield UNTESTED
    if place:
        yield place


def write(entry, folder, place=""):
    """Write <name>.json and <name>.html, a page that needs nothing else, to `folder`; return their paths.

    place : a sentence on where it stands on the board.
    """
    paths = [Path(folder) / f"{entry.name}.{kind}" for kind in ("json", "html")]
    template = jinja2.Template(Path(__file__).with_name("arena.html.jinja").read_text("utf-8"), autoescape=True)
    told = entry.summary() | {"place": place}
    rows = [flag | {"asks": asks(flag["check"]), "advice": advice(flag["check"])} for flag in told["flags"]]
    page = template.render(entry=told, norm=NORMS[told["norm"]], flags=sorted(rows, key=lambda row: row["passed"]),
                           raised=[row for row in rows if not row["passed"]],
                           untested="" if tested(told["flags"]) else UNTESTED, pictures=_pictures(entry))
    for path, text in zip(paths, (json.dumps(told, indent=1, ensure_ascii=False), page), strict=True):
        with files.atomic(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def _pictures(entry):
    """(PNG as base64, alternative text, caption) of some attacked images and of the curve."""
    pictures, curves = [], {name: rows.mean(axis=1) for name, rows in entry.curves.items()}
    if (won := np.flatnonzero((entry.report.clean == 0) & (entry.report.outcomes == 2))[:4]).size:
        pictures.append((figures.png(figures.image_strip(list(_strips(entry, won)))),
                         f"{len(won)} test images, each before the attack, the change, and after it, when the defence "
                         "says something else and does not refuse",
                         "Images that evade: as they are, with the answer and its probability; the change, "
                         "strengthened; the worst that the attacks made of them."))
    drawn = {name: values[None] for name, values in curves.items()}
    ends = "; ".join(f"{name} attacker: from {values[0]:.0%} without an attack to {values[-1]:.0%} at ε = "
                     f"{entry.threat.eps:g}" for name, values in curves.items())
    n = len(next(iter(entry.curves.values()))[0])
    pictures.append((figures.png(figures.security_curve(entry.grid, drawn, ylabel="right or refused",
                                                        norm=entry.threat.norm)), ends,
                     "What is left by ε. Unaware: PGD on the first path, which may ignore the defence. Informed: PGD "
                     f"on the last path, and at the largest ε all attacks of the table. One seed, {n} images."))
    return pictures


def _strips(entry, rows):
    """What `figures.image_strip` takes, for the images `rows`."""
    names, images = entry.dataset.class_names, entry.report.found.images
    for i in rows:
        ends = [(names[p[i].argmax()], p[i].max()) for p in entry.sure]
        yield entry.x[i], images[i], *ends, "change"
