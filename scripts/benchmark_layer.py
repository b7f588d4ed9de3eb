"""What the attention layer costs beyond its kernel, and masks when every batch holds other documents.

python scripts/benchmark_layer.py --shapes A B C D E
python scripts/benchmark_layer.py --shapes B --layouts 1000 --lengths 16 --out docs/results/attention_layer

The layer is timed between its projections: rotation, attention, and whatever moves numbers in between, as
one of several that a graph holds in a model, so that they share their table of angles. Its floor is the
kernel alone, as often, plus the rotation's least traffic (queries, keys and their gradients read and written
once) at the measured bandwidth of copies. With --layouts, that many batches follow, each with documents of
its own and one of several lengths, as in training: ranges are made on the host and copied.

Shapes: B batch, T tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attention_peers import Problem
from benchmark_attention import (
    PACKAGES,
    PIPED_WIDTH,
    Inputs,
    Stopwatch,
    checked_options,
    circumstances,
    draw_documents,
    draw_inputs,
    make_problem,
    name_of,
    parser_of_shapes,
    request_of,
    sizes_of,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters

from windowlm.attention.dispatch import attention, choose_backend
from windowlm.attention.layers import SlidingWindowAttention
from windowlm.attention.window import Visibility
from windowlm.errors import exit_status

COPIED = {"cuda": 2**30, "cpu": 2**26}
MEDIAN_DOCUMENT = 1500
# Writes before the clock starts: time for the host to launch the kernels of all layers.
AHEAD = 60
WARM = 2
Heads = tuple[Tensor, ...]


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    options = parse_options()
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    report = {
        **circumstances(options.device, PACKAGES),
        "dtype": name_of(options.dtype),
        "compiled": not options.eager,
        "shapes": [],
    }
    table = Table("", "backend", *("kernel ms", "layer ms", "least traffic ms", "layer over floor"))
    for name in options.shapes:
        row = time_layer(make_problem(name, options), options)
        report["shapes"].append(row)
        table.add_row(*cells_of(row))
        write(report, options.out)
    console.print(table)
    if options.layouts:
        report["layouts"] = vary_layouts(make_problem(options.shapes[0], options), options)
        console.print_json(data=report["layouts"])
        write(report, options.out)
    return 0


def write(report: dict[str, Any], folder: Path | None) -> None:
    """Write the report, where a folder is given."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "layer.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    """Read the command line, with defaults that fit the device."""
    parser = parser_of_shapes(__doc__, rounds=20, written="layer.json")
    parser.add_argument(
        "--layouts", type=int, default=0, help="batches of other documents, at the first shape"
    )
    parser.add_argument("--lengths", type=int, help="sequence lengths among the layouts (16)")
    parser.add_argument("--layers", type=int, default=8, help="in one graph, when one is timed")
    parser.add_argument("--eager", action="store_true", help="do not compile the layer")
    options = checked_options(parser, {"rounds": 1, "lengths": 1, "layers": 1, "layouts": 0, "documents": 1})
    for shape in options.shapes:
        head_dim = sizes_of(shape)[4]
        if head_dim % 2:
            parser.error(f"--shapes {shape}: head_dim {head_dim} is odd, which the rotation cannot pair up")
    tokens = sizes_of(options.shapes[0])[1]
    if options.lengths is not None and not options.layouts:
        parser.error(f"--lengths {options.lengths}: beside --layouts it is allowed; try --layouts 1000")
    options.lengths = options.lengths or min(16, tokens)
    if options.lengths > tokens:
        parser.error(
            f"--lengths {options.lengths}: at most {tokens} are there, the tokens of the first shape"
        )
    return options


def make_layer(problem: Problem) -> SlidingWindowAttention:
    """The layer whose middle is timed."""
    return SlidingWindowAttention(
        problem.heads * problem.head_dim,
        problem.heads,
        problem.head_dim,
        problem.window,
        dropout=0.0,
        kv_heads=problem.kv_heads,
    ).to(problem.device, problem.dtype)


def time_layer(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of kernel and layer in turns, forward and backward, beside the floor."""
    torch.manual_seed(options.seed)
    # A model has one shape; behind others the compiler makes kernels for any.
    torch.compiler.reset()
    inputs = [draw_inputs(problem) for _ in range(options.layers)]
    layer = make_layer(problem)
    visibility = Visibility.build(window=problem.window, documents_BT=problem.documents)

    def kernels(heads: Sequence[Heads]) -> list[Tensor]:
        return [attention(*of_layer, visibility) for of_layer in heads]

    def layers(heads: Sequence[Heads]) -> list[Tensor]:
        return [layer.mix(*of_layer, visibility) for of_layer in heads]

    contestants = {
        "kernel": kernels,
        "layer": layers if options.eager else torch.compile(layers, fullgraph=True),
    }
    watch = Stopwatch(problem.device, ahead=AHEAD)
    spent: dict[str, list[float]] = {
        f"{name}_{part}_ms": [] for name in contestants for part in ("forward", "backward")
    }
    heads = [of_layer[:3] for of_layer in inputs]
    flat = [tensor for of_layer in heads for tensor in of_layer]
    held: list[Tensor] = []

    def backward() -> None:
        torch.autograd.grad(held, flat, [of_layer[3] for of_layer in inputs])
        held.clear()

    for turn in range(WARM + options.rounds):
        for name, attend in contestants.items():

            def forward(attend: Callable[[Sequence[Heads]], list[Tensor]] = attend) -> None:
                held.extend(attend(heads))

            for part, ms in zip(("forward", "backward"), watch.run(forward, backward), strict=True):
                if turn >= WARM:
                    spent[f"{name}_{part}_ms"].append(ms / options.layers)
    row: dict[str, Any] = {name: statistics.median(times) for name, times in spent.items()}
    traffic_ms = least_traffic_bytes(inputs[0]) / copy_bytes_per_second(watch) * 1e3
    for part in ("forward", "backward"):
        row[f"{part}_over_floor"] = row[f"layer_{part}_ms"] / (row[f"kernel_{part}_ms"] + traffic_ms)
    layer_ms, kernel_ms = (
        row[f"{name}_forward_ms"] + row[f"{name}_backward_ms"] for name in ("layer", "kernel")
    )
    return row | {
        "shape": problem.name,
        "documents": problem.documents is not None,
        "layers": options.layers,
        "backend": choose_backend("auto", request_of(problem)).name,
        "least_traffic_ms": traffic_ms,
        "over_floor": layer_ms / (kernel_ms + 2 * traffic_ms),
    }


def least_traffic_bytes(inputs: Inputs) -> int:
    """Bytes that a rotation of queries and keys cannot do without, one way: read once, written once."""
    return 2 * sum(tensor.numel() * tensor.element_size() for tensor in inputs[:2])


def copy_bytes_per_second(watch: Stopwatch) -> float:
    """Bytes read and written a second by a copy between large tensors."""
    source = torch.zeros(COPIED[watch.device.type], dtype=torch.int8, device=watch.device)
    target = torch.empty_like(source)
    times = [watch.run(lambda: target.copy_(source))[0] for _ in range(9)]
    return 2 * source.numel() / (statistics.median(times) / 1e3)


def cells_of(row: dict[str, Any]) -> list[str]:
    """One row of the table, forward/backward."""
    return [
        row["shape"] + (" documents" if row["documents"] else ""),
        row["backend"],
        f"{row['kernel_forward_ms']:.3f}/{row['kernel_backward_ms']:.3f}",
        f"{row['layer_forward_ms']:.3f}/{row['layer_backward_ms']:.3f}",
        f"{row['least_traffic_ms']:.3f}",
        f"{row['forward_over_floor']:.2f}/{row['backward_over_floor']:.2f} ({row['over_floor']:.3f})",
    ]


def vary_layouts(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """Batches of other documents and lengths through one layer: compilations, mask times and memory.

    Warm are the batches after the first that had all lengths twice. Memory is what is held behind the same
    length each time.
    """
    torch.manual_seed(options.seed)
    torch.compiler.reset()
    counters.clear()
    layer, watch = make_layer(problem), Stopwatch(problem.device)
    mix = layer.mix if options.eager else torch.compile(layer.mix, fullgraph=True)
    spacing = problem.tokens // options.lengths
    lengths = [problem.tokens - spacing * number for number in range(options.lengths)]
    inputs = draw_inputs(problem)
    warm_from = 2 * options.lengths
    graphs_when_warm = 0
    held_mib: list[float | None] = []
    made_ms, copied_ms, attended_ms = [], [], []
    slowest_step_s = 0.0
    for batch in range(warm_from + options.layouts):
        length = lengths[batch % options.lengths]
        if batch == warm_from:
            graphs_when_warm, slowest_step_s = counters["stats"]["unique_graphs"], 0.0
        if batch >= warm_from and batch % options.lengths == 0:
            held_mib.append(memory_of(problem))
        documents_BT = draw_documents(
            problem.batch, length, options.documents or MEDIAN_DOCUMENT, options.seed + batch
        )
        cut = tuple(tensor[:, :length].detach() for tensor in inputs)
        heads = [tensor.contiguous().requires_grad_() for tensor in cut[:3]]
        moved: list[Visibility] = []
        started = time.perf_counter()
        visibility = Visibility.build(window=problem.window, documents_BT=documents_BT).prepare(problem.batch)
        made = time.perf_counter()
        if problem.device.type == "cuda":
            visibility = visibility.pin_memory()

        def copy(visibility: Visibility = visibility, moved: list[Visibility] = moved) -> None:
            moved.append(visibility.to(problem.device, non_blocking=True))

        def attend(heads: Any = heads, gradient: Any = cut[3], moved: list[Visibility] = moved) -> None:
            torch.autograd.grad(mix(*heads, moved[0]), heads, gradient)

        begun = time.perf_counter()
        spent = watch.run(copy, attend)
        slowest_step_s = max(slowest_step_s, time.perf_counter() - begun)
        if batch >= warm_from and length == problem.tokens:
            made_ms.append((made - started) * 1e3)
            copied_ms.append(spent[0])
            attended_ms.append(spent[1])
    attention_ms, mask_ms = statistics.median(attended_ms), statistics.median(copied_ms)
    return {
        "batches": options.layouts,
        "lengths": lengths,
        "graphs_when_warm": graphs_when_warm,
        "graphs_at_the_end": counters["stats"]["unique_graphs"],
        "slowest_warm_step_s": slowest_step_s,
        "mask_on_host_ms": statistics.median(made_ms),
        "mask_on_device_ms": mask_ms,
        "attention_ms": attention_ms,
        "mask_over_attention": mask_ms / attention_ms,
        "memory_when_warm_mib": held_mib[0],
        "memory_at_the_end_mib": held_mib[-1],
    }


def memory_of(problem: Problem) -> float | None:
    """MiB that tensors hold on the device; None where it cannot be told."""
    return torch.cuda.memory_allocated() / 2**20 if problem.device.type == "cuda" else None


if __name__ == "__main__":
    sys.exit(exit_status(main))
