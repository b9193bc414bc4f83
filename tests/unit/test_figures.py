"""The figures: alternative text, metadata, colours that colour-blind readers tell apart, a slider without a kernel."""

import base64
import io
import re
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

from helpers import figures
from helpers.verdicts import VERDICTS

# Linear-RGB simulation of complete colour-vision deficiency: Machado, Oliveira and Fernandes (2009).
SIMULATED = {
    "typical": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}


def linear(colour):
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour, matrix):
    rgb = np.clip(np.asarray(matrix) @ linear(colour), 0, 1)
    return rgb2lab(np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055))


def contrast(first, second):
    low, high = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture
def shown(monkeypatch):
    calls = []
    monkeypatch.setattr(figures, "display", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


@pytest.fixture
def rng():
    return np.random.default_rng(0)


class Page(HTMLParser):
    """Collect the tags of a piece of HTML as (name, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_show_refuses_a_figure_without_alternative_text(shown, alt):
    with pytest.raises(ValueError, match="^alt: got an empty text; expected"):
        figures.show(Figure(), alt=alt)
    assert not shown


def test_show_displays_one_png_with_its_texts_as_metadata(shown):
    figures.show(Figure(), alt="Accuracy falls.", caption="A curve")
    [((bundle,), options)] = shown
    assert bundle["image/png"].startswith("iVBOR")
    assert bundle["text/plain"] == "Accuracy falls."
    assert options == {"raw": True, "metadata": {"image/png": {"alt": "Accuracy falls.", "caption": "A curve"}}}


def test_say_displays_markdown(shown):
    figures.say("Accuracy is **0.5**.")
    assert shown[0][0][0].data == "Accuracy is **0.5**."


@pytest.mark.parametrize("colour", figures.COLOURS.values(), ids=figures.COLOURS.keys())
def test_lines_reach_the_contrast_of_graphics(colour):
    assert contrast(colour, figures.BACKGROUND) >= 3


@pytest.mark.parametrize("vision", SIMULATED)
@pytest.mark.parametrize("group", ["DEFENCES", "ATTACKS", "REJECTION", "FILTERS", "KNOWLEDGE", "PURIFICATION"])
def test_colours_of_a_group_are_told_apart(group, vision):
    for first, second in combinations(getattr(figures, group).values(), 2):
        distance = deltaE_ciede2000(lab(first, SIMULATED[vision]), lab(second, SIMULATED[vision]))
        assert distance > 15, (first, second)


def test_verdicts_differ_without_colour_and_their_numbers_are_legible():
    fills, hatches = zip(*figures.VERDICTS.values(), strict=True)
    assert len(set(hatches)) == len(hatches)
    assert all(contrast(figures.INK, fill) >= 4.5 for fill in fills)


def test_security_curve_draws_the_mean_and_the_range_of_the_seeds():
    values = {"normal": [[1.0, 0.4], [1.0, 0.0]], "mixed-batch": [[1.0, 0.9], [1.0, 0.7]], "new": [[1, 1], [1, 1]]}
    ax = figures.security_curve([0, 0.1], values, trained_eps=0.1).axes[0]
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_allclose(lines["normal"].get_ydata(), [1.0, 0.2])
    band = ax.collections[0].get_paths()[0].vertices
    assert {(0.1, 0.0), (0.1, 0.4)} <= {tuple(point) for point in band}
    assert lines["mixed-batch"].get_color() == figures.COLOURS["mixed-batch"]
    assert "trained at ε = 0.1" in lines
    assert "range of 2 seeds" in ax.get_legend().get_title().get_text()
    looks = [(lines[n].get_color(), lines[n].get_marker(), lines[n].get_linestyle()) for n in values]
    assert all(len(set(look)) == 3 for look in zip(*looks, strict=True))
    ax.figure.draw_without_rendering()
    np.testing.assert_allclose(ax.child_axes[0].get_xlim(), 255 * np.array(ax.get_xlim()))


def test_an_l2_curve_has_no_axis_in_steps_of_255():
    ax = figures.security_curve([0.0, 0.5], {"normal": np.ones((1, 2))}, norm="l2").axes[0]
    assert not ax.child_axes and "L2" in ax.get_xlabel()


def test_a_legend_has_the_seeds_of_every_line():
    ax = figures.security_curve([0, 0.1], {"normal": np.ones((5, 2)), "noise": np.ones((1, 2))}).axes[0]
    assert ax.get_legend().get_title().get_text() == "mean and range of 1 or 5 seeds"


def test_security_curve_of_one_seed_says_so():
    ax = figures.security_curve([0, 0.1], {"noise": np.ones((1, 2))}).axes[0]
    assert ax.get_legend().get_title().get_text() == "one seed"


@pytest.mark.parametrize("values", [[0.1, 0.2], [[0.1, 0.2, 0.3]]])
def test_a_curve_of_the_wrong_shape_is_named(values):
    with pytest.raises(ValueError, match=r"normal: got shape \(.*\); expected .n_seeds"):
        figures.security_curve([0, 0.1], {"normal": values})


def test_learning_curves_sorts_metrics_into_panels(rng):
    metrics = {"accuracy": rng.random((3, 5)), "adversarial_accuracy": rng.random((3, 5)), "loss": rng.random((3, 5))}
    accuracy, loss = figures.learning_curves({"normal": metrics, "fine-tuned": metrics}).axes
    assert (len(accuracy.lines), len(loss.lines)) == (4, 2)
    assert loss.lines[1].get_color() == figures.COLOURS["fine-tuned"]
    assert list(accuracy.lines[0].get_xdata()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_image_strip_states_gain_class_and_confidence(rng, shape):
    x = 0.5 * rng.random(shape)
    fig = figures.image_strip([(x, x + 0.1, ("3", 0.99), ("8", 0.512), "FGSM"), (x, x, ("3", 1), ("3", 1), "none")])
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[:3] == ["3 (99%)", "FGSM: × 5", "8 (51%)"]
    np.testing.assert_allclose(fig.axes[4].images[0].get_array(), 0.5)


def test_digit_grid_has_a_cell_an_image(rng):
    fig = figures.digit_grid(rng.random((7, 8, 8)), titles=list("abcdefg"), columns=5)
    assert [len(ax.images) for ax in fig.axes] == [1] * 7 + [0] * 3
    assert fig.axes[6].get_title() == "g"


def test_heatmap_writes_its_numbers():
    frame = pd.DataFrame([[0.125, 1.0]], index=["normal"], columns=[0.1, 0.2])
    ax = figures.heatmap(frame, "Accuracy", fmt=".3f").axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.125", "1.000"]
    assert ax.get_title() == "Accuracy"


def test_heatmaps_numbers_can_be_read_on_every_colour():
    ax = figures.heatmap(pd.DataFrame(np.linspace(0, 1, 50)[None]), "Accuracy").axes[0]
    cells = ax.collections[0].get_facecolor()
    pairs = zip(ax.texts, map(to_hex, cells), strict=True)
    assert min(contrast(to_hex(text.get_color()), cell) for text, cell in pairs) >= 4.5


def test_verdict_bars_count_and_say_what_has_not_run():
    fig = figures.verdict_bars({"One": {"reproduced": 3, "not-reproduced": 1}, "Two": {}})
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert {"3", "1", "no record yet"} <= set(texts)
    assert "0" not in texts
    assert [text.get_text() for text in fig.legends[0].texts] == list(figures.VERDICTS) == list(VERDICTS)


def test_what_is_left_has_two_marks_a_defence_and_says_what_has_not_run():
    ax = figures.left_standing({"One": ([0.9, 1.0], [0.0, 0.2]), "Two": ([], [])}).axes[0]
    figures.left_standing({"Three": ([0.1] * 3, [0.1] * 3)})  # their mean is not 0.1
    assert [text.get_text() for text in ax.texts] == ["95%", "10%", "no record yet"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["One", "Two"]


def slider(rng, label="FGSM on a <3>"):
    eps = [0.0, 0.1, 0.2]
    return eps, figures.eps_slider([(rng.random((8, 8)), f'reads "{i}"') for i in range(3)], eps, label).data


def test_slider_is_self_contained_and_has_a_frame_for_each_eps(rng):
    eps, text = slider(rng)
    page = Page(text)
    frames, [control] = page.all("img"), page.all("input")
    assert len(frames) == len(eps)
    assert all(frame["src"].startswith("data:image/png;base64,iVBOR") for frame in frames)
    assert [frame["alt"] for frame in frames][1] == 'ε = 0.1 (25.5/255): reads "1"'
    assert ["hidden" in frame for frame in frames] == [False, True, True]  # the first is what print and no script show
    assert (control["type"], control["min"], control["max"]) == ("range", "0", "2")
    assert control["aria-label"] == "FGSM on a <3>"
    assert len(page.all("output")) == 1
    assert "//" not in re.sub(r'src="[^"]*"', "", text)
    assert len(text) < 100_000


def test_an_l2_slider_has_no_steps_of_255():
    text = figures.eps_slider([(np.zeros((8, 8)), "clean")], [3.0], "PGD", "l2").data
    assert 'alt="ε = 3: clean"' in text


def test_sliders_on_one_page_have_their_own_ids_and_the_same_input_the_same_id(rng):
    ids = [Page(slider(np.random.default_rng(seed))[1]).all("figure")[0]["id"] for seed in (0, 1, 0)]
    assert ids[0] != ids[1]
    assert ids[0] == ids[2]
    assert Page(slider(np.random.default_rng(0), "another")[1]).all("figure")[0]["id"] not in ids


@pytest.mark.parametrize(("n_frames", "n_eps", "label"), [(1, 2, "a"), (0, 0, "a"), (1, 1, " ")])
def test_slider_refuses_what_it_cannot_label(n_frames, n_eps, label):
    with pytest.raises(ValueError, match="^frames: got" if label.strip() else "^label: got"):
        figures.eps_slider([(np.zeros((8, 8)), "text")] * n_frames, [0.1] * n_eps, label)


def test_use_style_reaches_new_figures():
    figures.use_style()
    assert Figure().subplots().get_facecolor() == pytest.approx((0.980, 0.980, 0.969, 1), abs=1e-3)


def test_a_picture_keeps_its_grey_levels():
    """A palette of 256 colours is more than a perturbation away from a photograph."""
    ramp = np.stack([*np.meshgrid(np.linspace(0, 1, 80), np.linspace(0, 1, 80)), np.full((80, 80), 0.4)], axis=-1)
    shown = [Image.open(io.BytesIO(base64.b64decode(figures.png(fig)))) for fig in (
        figures.digit_grid([ramp], columns=1, size=2), figures.security_curve([0, 0.1], {"normal": [[1.0, 0.5]]}))]
    assert [image.mode for image in shown] == ["RGB", "P"]
