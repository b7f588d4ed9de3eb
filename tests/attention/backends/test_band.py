"""How our kernels are launched; their results are compared where there is a GPU."""

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from windowlm.attention.backends import band


class Launches:
    """Stands in for a kernel and notes the grids that it is launched with."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.grids.append(grid)


def test_any_number_of_rows_and_heads_is_launched_along_the_axis_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels: Any = ModuleType("kernels")
    launches = Launches()
    for name in ("forward_kernel", "query_gradient_kernel", "key_value_gradient_kernel"):
        setattr(kernels, name, launches)
    monkeypatch.setitem(sys.modules, "windowlm.attention.backends.band_kernels", kernels)
    query, key = (torch.empty(70_000, 300, heads, 16, device="meta") for heads in (4, 2))
    output, normalizer = band.forward(query, key, key, [], 20, 0.25)
    band.backward(query, key, key, output, normalizer, output, [], 20, 0.25)
    tiles = band.schedule_for(16, 20, packed=False, roomy=False)
    pack = 2
    assert launches.grids == [
        (-(-300 // (tiles.forward.rows // pack)) * 140_000,),
        (-(-300 // (tiles.query_gradient.rows // pack)) * 140_000,),
        (-(-300 // tiles.key_value_gradient.keys) * 140_000,),
    ]


def test_heads_that_lie_too_far_apart_for_the_kernels_are_brought_together() -> None:
    heads_BHTD = torch.empty(1, 32, 2**20, 128, device="meta", dtype=torch.bfloat16)
    assert band._reachable(heads_BHTD.transpose(1, 2)).stride() == (2**32, 2**12, 2**7, 1)
    near_BTHD = heads_BHTD[:, :8].transpose(1, 2)
    assert band._reachable(near_BTHD) is near_BTHD


def test_tiles_that_fill_the_memory_of_an_h100_are_for_gpus_that_have_it() -> None:
    def bytes_of(tiles: band.Tiles) -> int:
        # Keys and values of each stage, and the rows' own numbers.
        return 2 * 128 * (tiles.rows + 2 * tiles.stages * tiles.keys)

    for window, packed in itertools.product((64, 1024, 4096), (False, True)):
        small = band.schedule_for(128, window, packed, roomy=False)
        # What Triton takes for other GPUs: one stage is in registers.
        taken = (
            small.forward.rows + 2 * (small.forward.stages - 1) * small.forward.keys,
            2 * small.query_gradient.rows + 2 * (small.query_gradient.stages - 1) * small.query_gradient.keys,
            2 * small.key_value_gradient.keys
            + 2 * (small.key_value_gradient.stages - 1) * small.key_value_gradient.rows,
        )
        assert 2 * 128 * max(taken) <= 99 * 1024
    for window in (64, 1024, 4096):
        for packed in (False, True):
            assert bytes_of(band.schedule_for(128, window, packed, roomy=True).forward) <= band.ROOMY_BYTES
            assert bytes_of(band.schedule_for(128, window, packed, roomy=False).forward) <= 163 * 1024


def test_outputs_have_contiguous_rows_whatever_the_strides_of_one_entry_say() -> None:
    for strides in ((1, 16, 0, 1), (240, 48, 16, 1), (240, 16, 80, 1), (1, 3, 7, 1)):
        query = torch.empty(2000).as_strided((1, 5, 3, 16), strides)
        assert band._empty_like(query).stride(-1) == 1
    permuted = torch.empty(1, 3, 5, 16).transpose(1, 2)
    assert band._empty_like(permuted).stride() == permuted.stride()
