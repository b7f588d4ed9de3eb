"""The tiles asked of flash-attn-4; its results are compared where there is a GPU."""

import pytest

from windowlm.attention.backends.flash4 import HOPPER, SMALL_TILES, SMALL_WINDOW, tiles_for


@pytest.mark.parametrize("group_size", [2, 3, 4, 6, 8])
def test_small_windows_take_small_tiles_that_hold_whole_groups(group_size: int) -> None:
    assert tiles_for(SMALL_WINDOW, group_size, HOPPER) == SMALL_TILES
    assert SMALL_TILES[0] % group_size == 0


@pytest.mark.parametrize(
    ("window", "group_size", "generation"),
    [
        (SMALL_WINDOW + 1, 4, HOPPER),
        (None, 4, HOPPER),
        (64, 1, HOPPER),
        (64, 5, HOPPER),
        (64, 4, HOPPER + 1),
    ],
)
def test_elsewhere_the_package_chooses(window: int | None, group_size: int, generation: int) -> None:
    assert tiles_for(window, group_size, generation) is None
