"""Time the tiles of band's three kernels on a GPU, each kernel with the others as they are.

python scripts/tune_band.py --shapes A C D --out docs/results/band_tiles
python scripts/tune_band.py --shapes D --documents 1500 --kernels key_value_gradient

Every combination of rows, keys, warps and stages whose sums a thread's registers can hold is compiled, by
several processes at once and on few tokens, then timed round after round in turns: the forward pass, or the
whole backward pass. What a GPU has no shared memory for is left out. Shapes and documents are those of
`benchmark_attention.py`; `schedule_for` in `band.py` is where the best ones go.

Shapes: B batch, T tokens, H query heads, K key-value heads, D head dimension.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any

import torch
from benchmark_attention import (
    PACKAGES,
    PIPED_WIDTH,
    checked_options,
    circumstances,
    draw_documents,
    name_of,
    parser_of_shapes,
    sizes_of,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from windowlm.attention.backends import band
from windowlm.attention.backends.band import Schedule, Tiles
from windowlm.attention.window import Visibility
from windowlm.errors import exit_status

KERNELS = ("forward", "query_gradient", "key_value_gradient")
GRID = tuple(Tiles(*numbers) for numbers in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)))
MOST_NUMBERS_OF_A_THREAD = 256
FEW_TOKENS = 256
CALLS, WARM_UPS = 3, 2
SHOWN = 6


@dataclass(frozen=True)
class Work:
    """The calls of one shape.

    Args:
        shape: as on the command line.
        tokens: fewer than the shape's compile the same kernels.
        documents: median length of packed documents; None for none.
        dtype, seed: as on the command line.
    """

    shape: str
    tokens: int
    documents: int | None
    dtype: torch.dtype
    seed: int

    def prepare(self) -> Callable[[str, Tiles], None]:
        """What calls a kernel with such tiles, on drawn numbers."""
        batch, _, heads, kv_heads, head_dim, window = sizes_of(self.shape)
        generator = torch.Generator("cuda").manual_seed(self.seed)

        def drawn(count: int) -> Tensor:
            size = (batch, self.tokens, count, head_dim)
            return torch.randn(size, device="cuda", dtype=self.dtype, generator=generator)

        query_BTHD, key_BTKD, value_BTKD, gradient_BTHD = map(drawn, (heads, kv_heads, kv_heads, heads))
        ranges: list[Tensor] = []
        if self.documents is not None:
            documents_BT = draw_documents(batch, self.tokens, self.documents, self.seed).to("cuda")
            visibility = Visibility.build(window=window, documents_BT=documents_BT)
            bounds = visibility.bounds(self.tokens, self.tokens, query_BTHD.device)
            ranges = [bounds.first_keys, bounds.last_queries, bounds.gaps]
        numbers = (query_BTHD, key_BTKD, value_BTKD)
        scale = head_dim**-0.5
        schedule = self.schedule()
        results = band.forward(*numbers, ranges, window, scale, schedule.forward)

        def call(kernel: str, tiles: Tiles) -> None:
            if kernel == "forward":
                band.forward(*numbers, ranges, window, scale, tiles)
            else:
                changed = replace(schedule, **{kernel: tiles})
                band.backward(*numbers, *results, gradient_BTHD, ranges, window, scale, changed)

        return call

    def schedule(self) -> Schedule:
        """The tiles that the backend takes."""
        _, _, _, _, head_dim, window = sizes_of(self.shape)
        return band.schedule_for(
            head_dim, window, self.documents is not None, band.roomy(torch.device("cuda:0"))
        )


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    options = parse_options()
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    report: dict[str, Any] = {**circumstances(options.device, PACKAGES), "dtype": name_of(options.dtype)}
    report |= {"documents": options.documents, "shapes": {}}
    for shape in options.shapes:
        tokens = sizes_of(shape)[1]
        work = Work(shape, tokens, options.documents, options.dtype, options.seed)
        jobs = [(kernel, tiles) for kernel in options.kernels for tiles in candidates(kernel, shape)]
        compile_all(replace(work, tokens=min(tokens, FEW_TOKENS)), jobs, options.processes)
        times = timed(work, jobs, options.rounds)
        console.print(table_of(work, times))
        report["shapes"][shape] = [
            {"kernel": kernel, "tiles": astuple(tiles), "ms": ms} for (kernel, tiles), ms in times.items()
        ]
        if options.out is not None:
            (options.out / "tiles.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of_shapes(__doc__, rounds=3, written="tiles.json")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    most = max((os.cpu_count() or 1) - 1, 1)
    parser.add_argument("--processes", type=int, default=most, help="that compile")
    options = checked_options(parser, {"rounds": 1, "processes": 1, "documents": 1}, {"processes": most})
    if options.device.type != "cuda" or options.dtype == torch.float32:
        parser.error("--device, --dtype: band runs on CUDA GPUs in bfloat16 and float16")
    for shape in options.shapes:
        if sizes_of(shape)[4] > band.CAPABILITIES.head_dim_limit:
            parser.error(
                f"--shapes {shape}: head dimensions up to {band.CAPABILITIES.head_dim_limit} are allowed"
            )
    return options


def candidates(kernel: str, shape: str) -> list[Tiles]:
    """Those whose sums fit into registers, 255 a thread."""
    dim = band.power_of_two(sizes_of(shape)[4])

    def numbers(tiles: Tiles) -> int:
        products = tiles.rows * tiles.keys * (1 if kernel == "forward" else 2)
        sums = 2 * tiles.keys * dim if kernel == "key_value_gradient" else tiles.rows * dim
        return (products + sums) // (32 * tiles.warps)

    return [tiles for tiles in GRID if numbers(tiles) <= MOST_NUMBERS_OF_A_THREAD]


def compile_all(work: Work, jobs: list[tuple[str, Tiles]], processes: int) -> None:
    """Leave the kernels in Triton's cache."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pool.starmap(compile_some, [(work, jobs[begin::processes]) for begin in range(processes)])


def compile_some(work: Work, jobs: list[tuple[str, Tiles]]) -> None:
    """In a process of its own."""
    call = work.prepare()
    for job in jobs:
        fits(call, *job)


def fits(call: Callable[[str, Tiles], None], kernel: str, tiles: Tiles) -> bool:
    """Whether the GPU has the shared memory for it."""
    from triton.runtime.errors import OutOfResources

    try:
        call(kernel, tiles)
    except OutOfResources:
        return False
    torch.cuda.synchronize()
    return True


def timed(work: Work, jobs: list[tuple[str, Tiles]], rounds: int) -> dict[tuple[str, Tiles], float]:
    """Medians in milliseconds of those that fit."""
    call = work.prepare()
    times: dict[tuple[str, Tiles], list[float]] = {job: [] for job in jobs if fits(call, *job)}
    for _ in range(rounds):
        for job, found in times.items():
            for index in range(WARM_UPS + CALLS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call(*job)
                end.record()
                end.synchronize()
                if index >= WARM_UPS:
                    found.append(begin.elapsed_time(end))
    return {job: statistics.median(found) for job, found in times.items()}


def table_of(work: Work, times: dict[tuple[str, Tiles], float]) -> Table:
    """The fastest of each kernel, and those that are taken."""
    table = Table(title=f"{work.shape}, documents {work.documents}: rows, keys, warps, stages")
    for column in ("kernel", "tiles", "ms", "taken now"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for kernel in dict.fromkeys(kernel for kernel, _ in times):
        now = getattr(work.schedule(), kernel)
        found = sorted((ms, astuple(tiles)) for (name, tiles), ms in times.items() if name == kernel)
        for place, (ms, tiles) in enumerate(found):
            if place < SHOWN or tiles == astuple(now):
                table.add_row(
                    kernel, ", ".join(map(str, tiles)), f"{ms:.3f}", "yes" * (tiles == astuple(now))
                )
    return table


if __name__ == "__main__":
    sys.exit(exit_status(main))
