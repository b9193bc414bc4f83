"""Pictures of the primer: the binarization test and the indicators of attack failure, on images of two pixels.

Nothing is drawn by hand: small gradient attacks run on small functions of a point in the plane, and what they do is
shown. `site.stage` draws them.
"""

import numpy as np
from matplotlib.patches import Rectangle

from helpers.figures import FAINT, INK, KNOWLEDGE, subplots

WEAK, STRONG = KNOWLEDGE["unaware"], KNOWLEDGE["informed"]
EPS, IMAGE = 0.3, np.array([0.45, 0.4])


def climb(function, start, steps, step_size, eps=EPS, image=IMAGE, gradient_of=None):
    """Points (steps + 1, 2) of a signed gradient ascent on `function` in the linf ball; by its own or another slope."""
    slope, points = gradient_of or function, [np.asarray(start, float)]
    for _ in range(steps):
        x = points[-1]
        gradient = np.array([(slope(x + h) - slope(x - h)) / 2e-4 for h in 1e-4 * np.eye(2)])
        points.append(np.clip(np.clip(x + step_size * np.sign(gradient), image - eps, image + eps), 0, 1))
    return np.array(points)


def features(x):
    """What the network of this plane makes of points (..., 2): bent, so that no straight way leads along it."""
    x1, x2 = np.moveaxis(np.asarray(x), -1, 0)
    return np.stack([x1 + 0.25 * np.sin(7 * x2), x2 - 0.15 * np.cos(6 * x1)], axis=-1)


def binarization():
    """The binarization test: an attack of a few small steps misses what is planted, one of larger steps finds it."""
    rng = np.random.default_rng(0)
    inner = IMAGE + 0.95 * EPS * rng.uniform(-1, 1, (60, 2))
    planted = IMAGE + EPS * np.array([1.0, 0.55])
    normal = features(planted) - features(IMAGE)
    height = (features(inner) @ normal).max() * 0.001 + (features(planted) @ normal) * 0.999

    def readout(x):
        return features(x) @ normal - height

    inner = inner[readout(inner) < 0]
    grid = np.linspace(0, 1, 200)
    z = readout(np.stack(np.meshgrid(grid, grid), axis=-1))
    axes = subplots(1, 2, 7.4, 4.0)[0]
    for ax, (name, steps, size, colour) in zip(axes, (
            ("five small steps: missed", 5, 0.02, WEAK), ("forty steps of 2.5 ε / 40: found", 40, EPS / 16, STRONG)),
            strict=True):
        path = climb(readout, IMAGE, steps, size)
        ax.contourf(grid, grid, z, levels=[0, z.max()], colors=["#d9d9d9"])
        ax.contour(grid, grid, z, levels=[0], colors=[INK], linewidths=1)
        ax.add_patch(Rectangle(IMAGE - EPS, 2 * EPS, 2 * EPS, fill=False, linestyle=":", edgecolor=FAINT))
        ax.plot(*inner.T, ".", color=FAINT, markersize=4)
        ax.plot(*planted, "*", color=INK, markersize=12)
        ax.plot(*path.T, "-o", color=colour, markersize=3)
        ax.plot(*IMAGE, "s", color=INK, markersize=6)
        ax.set(title=name, xlabel="first pixel", ylabel="second pixel", xlim=(0.05, 0.95), ylim=(0, 0.9), aspect=1)
        assert (readout(path[-1]) > 0) == (colour == STRONG)
    return axes[0].figure


def hill(x):
    """A goal with one summit above 0, within the ball of `IMAGE`."""
    return 0.6 - 9 * np.sum((np.asarray(x) - [0.62, 0.65]) ** 2, axis=-1)


def indicators():
    """The goal by step of an attack that fails in each of the six ways, and of the attack that is mended."""
    rng, far = np.random.default_rng(1), np.array([0.98, 0.95])
    start, sound = IMAGE - 0.12, climb(hill, IMAGE - 0.12, 40, 0.03)

    def terraced(x):
        return hill(np.floor(np.asarray(x) * 12 + 0.5) / 12)

    def surrogate(x):
        return 0.5 - 6 * np.sum((np.asarray(x) - [0.7, 0.3]) ** 2, axis=-1)

    def hidden(x):
        return 0.4 - 1.4 * np.sum((np.asarray(x) - far) ** 2, axis=-1) ** 0.5

    def rough(x):
        return hill(x) + 0.35 * rng.standard_normal(np.shape(x)[:-1])

    stuck = climb(terraced, start, 40, 0.03)
    jumping, noisy = climb(hill, start, 40, 0.03, gradient_of=rough), rough
    bounced = climb(hill, start, 11, 0.35)
    moved = climb(surrogate, start, 40, 0.03)
    frozen = climb(lambda x: np.minimum(hidden(x), -0.55), start, 40, 0.03, eps=1.0)
    panels = {
        "unavailable gradients": ((terraced(stuck), "steps have no slope"), (terraced(sound), "slope of a twin")),
        "unstable predictions": ((noisy(jumping), "one draw"), (hill(sound), "mean of many draws")),
        "silent success": ((hill(bounced), "last iterate"), (np.maximum.accumulate(hill(bounced)), "best iterate")),
        "incomplete optimisation": ((hill(sound)[:5], "four steps"), (hill(sound), "forty steps")),
        "transfer failure": ((hill(moved), "by another network's slope"), (hill(sound), "by its own slope")),
        "unconstrained failure": ((hidden(frozen), "a capped loss"), (hidden(climb(hidden, start, 40, 0.03, eps=1.0)),
                                                                     "the loss itself"))}
    axes = subplots(2, 3, 8.4, 5.6, ylim=(-2.3, 0.9))
    for ax, (name, lines) in zip(axes.ravel(), panels.items(), strict=True):
        ax.axhline(0, color=FAINT, linewidth=1)
        for (values, label), colour, style in zip(lines, (WEAK, STRONG), ("--", "-"), strict=True):
            ax.plot(values, style, color=colour, label=label)
            ax.plot(len(values) - 1, values[-1], "o", color=colour, markersize=5)
        ax.set(title=name)
        ax.legend(loc="lower right", fontsize="x-small")
        assert lines[0][0][-1] <= 0 < lines[1][0][-1], f"{name}: {lines[0][0][-1]}, {lines[1][0][-1]}"
    for ax in axes[-1]:
        ax.set_xlabel("step")
    for ax in axes[:, 0]:
        ax.set_ylabel("goal (above 0: won)")
    return axes[0, 0].figure
