import numpy as np
import pytest

from headwise.layout import View
from headwise.scores.sink_tokens import border, sink_tokens

GRID = (5, 6)
LAYOUT = (View(*GRID),)


def mean_map() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 0.3, size=30)


def test_the_border_is_the_outermost_ring() -> None:
    expected = [[row in (0, 4) or column in (0, 5) for column in range(6)] for row in range(5)]
    assert border(LAYOUT).reshape(GRID).tolist() == expected
    assert border((View(1, 4),)).all()
    assert border((View(2, 2),)).all()


def test_a_border_token_that_stands_out_is_a_sink_and_an_inner_one_is_not() -> None:
    maps = mean_map()
    maps[[0, 23, 14]] = 0.9  # a corner, a right edge, and an inner token
    assert np.flatnonzero(sink_tokens(maps, LAYOUT, 1.5)).tolist() == [0, 23]


def test_an_even_map_has_no_sinks() -> None:
    assert not sink_tokens(mean_map(), LAYOUT, 1.5).any()
    assert not sink_tokens(np.full(30, 0.25), LAYOUT, 1.5).any()


@pytest.mark.parametrize(("fence", "is_sink"), [(1.0, True), (3.0, False)])
def test_the_fence_is_measured_in_interquartile_ranges_above_the_third(fence: float, is_sink: bool) -> None:
    maps = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 16.0])  # Q1 = 2, Q3 = 6: two ranges and a half above
    assert sink_tokens(maps, (View(3, 3),), fence).tolist() == [False] * 8 + [is_sink]


def test_a_token_that_is_rarely_looked_at_is_no_sink() -> None:
    maps = mean_map()
    maps[0] = 0.0
    assert not sink_tokens(maps, LAYOUT, 1.5).any()


def test_a_seam_between_tiles_is_no_border_and_the_image_in_its_padding_is_one() -> None:
    left, right = border((View(3, 3, right=1 / 3), View(3, 3, left=1 / 3))).reshape(2, 3, 3).tolist()
    assert left == [[True] * 3, [True, False, False], [True] * 3]
    assert right == [[True] * 3, [False, False, True], [True] * 3]
    padded = border((View(6, 3, top=-0.5, bottom=1.5),)).reshape(6, 3)  # cells of a third of the image: the second starts above it
    assert padded[:, 1].tolist() == [True, True, False, False, True, True]
