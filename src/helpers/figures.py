"""Every plot of the book: functions return a figure, and `show` displays it with its alternative text."""

import base64
import hashlib
import io
from pathlib import Path

import jinja2
import numpy as np
import seaborn as sns
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from PIL import Image
from seaborn.utils import relative_luminance

# A light background of its own: each colour has one contrast (tested), on a dark page and in print alike.
BACKGROUND, INK, FAINT = "#fafaf7", "#1a1a1a", "#5f5f5f"
DEFENCES = {"normal": INK, "fine-tuned": "#d55e00", "mixed-batch": "#0072b2", "PGD-trained": "#009e73"}
ATTACKS = {"FGSM": "#c77b00", "BIM": "#2e8bd8", "PGD": "#7b2d00", "transfer": "#332288", "noise": "#8a8a8a"}
REJECTION = {"DNN": INK, "NR": "#882255", "DNR": "#00868b"}
FILTERS = {"no filter": INK, "gaussian": "#0072b2", "median": "#d55e00", "jpeg": "#009e73", "bits": "#882255"}
KNOWLEDGE = {"informed": "#7b2d00", "unaware": "#2e8bd8", "one guess": "#c77b00"}
PURIFICATION = {"bare": INK, "purified": "#0072b2", "adversarial training": "#009e73", "denoising": "#c77b00",
                "total variation": "#882255"}
# Distinct within each group for colour-blind eyes; dashes and markers help.
COLOURS = DEFENCES | ATTACKS | REJECTION | FILTERS | KNOWLEDGE | PURIFICATION
VERDICTS = {"reproduced": ("#7cc4e8", ""), "undecided": ("#c9e3c1", "--"), "direction": ("#f2d98d", "//"),
            "not-reproduced": ("#ee9a6f", "xx"), "not-testable": ("#d9d9d9", ".."),
            "withdrawn": ("#ffffff", "oo")}


def use_style():
    """Set the book's style for every figure that follows."""
    sns.set_theme(style="whitegrid", font_scale=0.95, rc={"axes.facecolor": BACKGROUND, "figure.dpi": 130})


def show(fig, alt, caption="", cover=False):
    """Display a Figure once as PNG, with its alternative text (the finding) and caption as metadata.

    cover : the page shows it under its title as well, before any code.
    """
    if not alt.strip():
        raise ValueError("alt: got an empty text; expected a sentence that says what the figure finds")
    metadata = {"image/png": {"alt": alt, "caption": caption} | ({"cover": True} if cover else {})}
    display({"image/png": png(fig), "text/plain": alt}, raw=True, metadata=metadata)


def say(markdown):
    """Display Markdown: a sentence whose numbers are computed in the notebook."""
    display(Markdown(markdown))


def security_curve(eps, series, ylabel="accuracy", trained_eps=None, ax=None, norm="linf"):
    """A rate in [0, 1] against eps; `series`: name -> (n_seeds, n_eps); `trained_eps` gets a line, `ax` the panel.

    With `norm` "linf" eps is also counted in steps of 1/255; an "l2" length has no such unit.
    """
    ax = subplots(1, 1, 6, 4.8)[0, 0] if ax is None else ax
    if trained_eps is not None:
        ax.axvline(trained_eps, color=FAINT, linestyle=":", label=f"trained at ε = {trained_eps:g}")
    ax.set(xlabel=f"ε ({'L2, ' * (norm == 'l2')}pixel range [0, 1])", ylabel=ylabel, ylim=(-0.02, 1.02))
    if norm == "linf":
        ax.secondary_xaxis("top", functions=(lambda e: e * 255, lambda n: n / 255)).set_xlabel("ε (n/255)")
    _bands(ax, series, np.asarray(eps), "osD^vPX*<")
    return ax.figure


def learning_curves(histories):
    """Panels for accuracy and loss; `histories`: network -> metric -> (n_seeds, n_epochs)."""
    axes = subplots(1, 2, 8, 5)[0]
    for ax, panel, ylabel in zip(axes, ("accuracy", "loss"), ("accuracy", "loss (nats)"), strict=True):
        ax.set(xlabel="epoch", ylabel=ylabel)
        _bands(ax, {f"{network}, {metric.replace('_', ' ')}": values for network, metrics in histories.items()
                    for metric, values in metrics.items() if panel in metric}, columns=1)
    return axes[0].figure


def image_strip(rows):
    """Original, change with its gain, result; rows: (x, x_adv, (class, confidence), the same after, name)."""
    images, titles = [], []
    for x, x_adv, before, after, name in rows:
        change = np.asarray(x_adv) - x
        gain = max(1, int(0.501 / max(np.abs(change).max(), 1e-3)))
        images += [x, 0.5 + gain * change, x_adv]
        titles += [f"{before[0]} ({before[1]:.0%})", f"{name}: × {gain}", f"{after[0]} ({after[1]:.0%})"]
    return digit_grid(images, titles, columns=3, size=2.2)


def digit_grid(images, titles=None, columns=10, size=1.0):
    """A grid of images in [0, 1], (height, width[, channels]) each, `size` inches wide, with short titles."""
    n_rows, bare = -(-len(images) // columns), {"frame_on": False, "xticks": (), "yticks": ()}
    axes = subplots(n_rows, columns, size * columns, (size + 0.25) * n_rows, **bare).ravel()
    for ax, image, title in zip(axes, images, titles or [""] * len(images), strict=False):
        ax.imshow(np.clip(np.squeeze(image), 0, 1), cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize="small")
    return axes[0].figure


def heatmap(frame, title, fmt=".2f"):
    """A DataFrame of rates as an annotated grid, each number black or white, as contrasts more with its cell."""
    ax = subplots(1, 1, 1.6 + 0.85 * frame.shape[1], 1.4 + 0.45 * frame.shape[0])[0, 0]
    sns.heatmap(frame, annot=True, fmt=fmt, cmap="cividis", linewidths=1, ax=ax).set_title(title)
    for text, cell in zip(ax.texts, ax.collections[0].get_facecolor(), strict=True):
        text.set_color("black" if relative_luminance(cell) > 0.179 else "white")  # there both have 4.6 : 1
    return ax.figure


def verdict_bars(counts):
    """Claims by verdict, a bar a paper; `counts`: title -> verdict -> number (none: no record yet)."""
    ax, left = subplots(1, 1, 7.2, 1.3 + 0.5 * len(counts))[0, 0], np.zeros(len(counts))
    for verdict, (fill, hatch) in VERDICTS.items():
        n = np.array([paper.get(verdict, 0) for paper in counts.values()])
        bars = ax.barh(list(counts), n, left=left, color=fill, hatch=hatch, edgecolor=FAINT, label=verdict)
        ax.bar_label(bars, [k or "" for k in n], label_type="center", bbox={"facecolor": fill, "linewidth": 0})
        left += n
    for row in np.flatnonzero(left == 0):
        ax.text(0.1, row, "no record yet", va="center", color=FAINT, style="italic")
    ax.set(xlabel="number of claims", xlim=(0, max(1, *left)), ylim=(len(counts) - 0.5, -0.5))
    ax.figure.legend(loc="outside lower center", ncols=-(-len(VERDICTS) // 2))
    return ax.figure


def left_standing(shares):
    """What two attackers leave of each defence; `shares`: label -> (weak, informed), each a list of one rate a seed."""
    ax = subplots(1, 1, 7.4, 1.4 + 0.62 * len(shares))[0, 0]
    looks = {"the paper's own attack, or one that ignores the defence": ("o", "none", KNOWLEDGE["unaware"]),
             "an attacker who knows the defence": ("D", "full", KNOWLEDGE["informed"])}
    marks = {}
    for row, ends in enumerate(shares.values()):
        if not all(ends):
            ax.text(0, row, "no record yet", va="center", color=FAINT, style="italic")
            continue
        ax.plot([np.mean(values) for values in ends], [row, row], color=FAINT, linewidth=1, zorder=1)
        for values, (label, (marker, fill, colour)) in zip(ends, looks.items(), strict=True):
            mean = np.mean(values)
            reach = np.abs([[mean - min(values)], [max(values) - mean]])  # of equal values the mean is off by rounding
            marks[label] = ax.errorbar(mean, row, xerr=reach, marker=marker, fillstyle=fill, color=colour, capsize=3,
                                       linestyle="")
            ax.annotate(f"{mean:.0%}", (mean, row), (0, 7), textcoords="offset points", ha="center", fontsize="small")
    ax.set(yticks=range(len(shares)), yticklabels=list(shares), ylim=(len(shares) - 0.5, -0.7), xlim=(-0.04, 1.04),
           xlabel="images that withstand the attack (mean and range of seeds)")
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.figure.legend(marks.values(), marks, loc="outside lower center")
    return ax.figure


def eps_slider(frames, eps, label, norm="linf"):
    """A slider as HTML, no kernel, no network; `frames`: (image in [0, 1] or Figure, text) for each eps.

    With `norm` "linf" each eps is also shown in steps of 1/255; an "l2" length has no such unit.
    """
    if len(frames) != len(eps) or not frames:
        raise ValueError(f"frames: got {len(frames)} for {len(eps)} eps; expected one each")
    if not label.strip():
        raise ValueError("label: got an empty text; expected what the slider moves")
    lengths = [f"ε = {e:.3g}" + (f" ({e * 255:.3g}/255)" if norm == "linf" else "") for e in eps]
    images = [(png(picture if isinstance(picture, Figure) else digit_grid([picture], columns=1, size=2.2)),
               f"{length}: {text}") for length, (picture, text) in zip(lengths, frames, strict=True)]
    template = jinja2.Template(Path(__file__).with_name("slider.html.jinja").read_text("utf-8"), autoescape=True)
    key = hashlib.sha256(f"{label}{images}".encode()).hexdigest()[:12]
    return HTML(template.render(key=f"eps-{key}", label=label, images=images))


def subplots(n_rows, n_columns, width, height, **options):
    """Panels (n_rows, n_columns) of a new Figure of so many inches; `options` go to each of them."""
    fig = Figure((width, height), layout="constrained", facecolor=BACKGROUND)
    return fig.subplots(n_rows, n_columns, squeeze=False, subplot_kw={"facecolor": BACKGROUND, **options})


def _bands(ax, series, x=None, markers=" ", columns=2):
    """Mean and range of each (n_seeds, n) array; known names have their colour, others take what is left."""
    names = dict.fromkeys(label.split(",")[0] for label in series)
    free = iter([colour for name, colour in COLOURS.items() if name not in names] * len(series))
    colours = {name: COLOURS.get(name) or next(free) for name in names}
    for i, (label, values) in enumerate(series.items()):
        if np.ndim(values) != 2 or (x is not None and np.shape(values)[1] != len(x)):
            raise ValueError(f"{label}: got shape {np.shape(values)}; expected (n_seeds, n_points)")
        at, colour = np.arange(1, np.shape(values)[1] + 1) if x is None else x, colours[label.split(",")[0]]
        ax.plot(at, np.mean(values, axis=0), ("-", "--", "-.", ":")[i % 4], color=colour, label=label,
                marker=markers[i % len(markers)])
        ax.fill_between(at, np.min(values, axis=0), np.max(values, axis=0), color=colour, alpha=0.2, linewidth=0)
    seeds = sorted({len(values) for values in series.values()})
    title = f"mean and range of {' or '.join(map(str, seeds))} seeds" if seeds[-1] > 1 else "one seed"
    ax.legend(title=title, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4.5)


def png(fig):
    """A Figure as PNG, base64: of 256 colours, a third of the bytes, where that changes less than half a grey level."""
    drawn, written = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", bbox_inches="tight", pad_inches=0.15, facecolor=BACKGROUND)
    exact = Image.open(drawn).convert("RGB")
    few = exact.quantize(256)
    error = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(exact, int)).mean()
    (few if error < 0.5 else exact).save(written, "png", optimize=True)
    return base64.b64encode(written.getvalue()).decode()
