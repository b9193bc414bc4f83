"""The primer's pictures show what the text says: the weak attack fails, the strong one wins."""

import numpy as np
import pytest

from helpers import primer


def test_a_climb_stays_in_its_ball_and_goes_up():
    points = primer.climb(primer.hill, primer.IMAGE, 30, 0.03)
    assert points.shape == (31, 2) and (np.abs(points - primer.IMAGE) <= primer.EPS + 1e-12).all()
    assert primer.hill(points[-1]) > 0 > primer.hill(points[0])


@pytest.mark.parametrize(("picture", "panels"), [(primer.binarization, 2), (primer.indicators, 6)])
def test_every_panel_has_an_attack_that_fails_and_one_that_wins(picture, panels):
    assert len(picture().axes) == panels  # it asserts itself who wins


def test_a_picture_with_another_ending_is_not_drawn(monkeypatch):
    monkeypatch.setattr(primer, "hill", lambda x: -np.ones(np.shape(x)[:-1]))
    with pytest.raises(AssertionError, match="unavailable gradients"):
        primer.indicators()
