"""Time our attention beside every installed peer, forward and backward, on one CPU or GPU.

python scripts/benchmark_attention.py --shapes A B
python scripts/benchmark_attention.py --shapes 1,8192,8,8,64,256 --entrants windowlm "causal sdpa" --threads 2
python scripts/benchmark_attention.py --shapes B --documents 1500 --out docs/results

A shape is batch,tokens,heads,kv_heads,head_dim,window or a name: A to E are sizes of language models, CPU
fits a laptop. Every entrant is first compared with attention in float64 at both ends and in the middle of the
very call that is timed, and all its numbers must be finite; its error is told as a multiple of the error of
plain PyTorch in the same dtype. Then all run in turns, in another order each round, so that a falling
clock, a busy neighbour or a card that the one before has heated meets them alike. TFLOP/s count visible pairs
only, the backward pass as 2.5 forward passes.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from attention_peers import FULL, PEERS, Attend, Problem, UnsupportedError
from rich.console import Console
from rich.table import Table
from torch import Tensor

from windowlm.attention.backends.capability import Request
from windowlm.attention.dispatch import MODULES, attention, capabilities, choose_backend, compute_capability
from windowlm.attention.window import Visibility, visible_pairs
from windowlm.command_line import WAITING_VARIABLES
from windowlm.errors import UserError, exit_status

SHAPES = {
    "A": (8, 4096, 12, 4, 64, 512),
    "B": (4, 8192, 16, 4, 64, 1024),
    "C": (1, 65536, 16, 4, 128, 1024),
    "D": (1, 65536, 16, 4, 128, 4096),
    "E": (2, 16384, 16, 2, 128, 128),
    "CPU": (1, 8192, 8, 8, 64, 256),
}
OURS = "windowlm"
PACKAGES = ("torch", "triton", "flash-attn-4", "windowlm")
# Rounding differs between kernels by less, a mask that is off by one key of 4,096 by more.
WRONG = 4.0
CHECKED_QUERIES = 128
REFERENCE_LIMIT = 4096
PIPED_WIDTH = 160
LARGEST = 2**31 - 1
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class Entrant:
    """One contestant at one shape: how it is called, and what was measured.

    Attributes:
        error: the largest error of output and gradients, as a multiple of plain PyTorch's.
        problem: why something is missing; None where all went well.
        absent: it is not installed, or this shape is not for it.
        setup_s: seconds of preparation and first call, compilation included.
        memory_mib: most memory beyond the inputs during one forward and backward pass.
        forward_ms, backward_ms: of every timed call.
    """

    name: str
    attend: Attend | None = None
    error: float | None = None
    problem: str | None = None
    absent: bool = False
    setup_s: float = 0.0
    memory_mib: float | None = None
    backward: bool = True
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    options = parse_options()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    report = {**circumstances(options.device, PACKAGES), "dtype": name_of(options.dtype), "shapes": []}
    for name in options.shapes:
        shape = benchmark(make_problem(name, options), options, console)
        report["shapes"].append(shape)
        write(report, options.out)  # after each shape: the next may take minutes to compile
    rows = [row for shape in report["shapes"] for row in shape["rows"]]
    if all(row["problem"] for row in rows):
        names = " ".join(dict.fromkeys(row["name"] for row in rows))
        raise UserError(
            f"--entrants {names}: none could be measured, as the tables say; leave it away for all"
        )
    return 0


def circumstances(device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """What a report says of how its figures came about."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "device": device_name(device),
        "compute_capability": compute_capability(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "waiting_threads": {name: os.environ.get(name) for name in sorted(WAITING_VARIABLES)},
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "versions": {name: version_of(name) for name in packages},
    }


def name_of(dtype: torch.dtype) -> str:
    """The dtype without the module's name."""
    return str(dtype).removeprefix("torch.")


def parse_options() -> argparse.Namespace:
    """Read the command line, with defaults that fit the device."""
    parser = parser_of_shapes(__doc__, rounds=7, written="attention.json and attention.png")
    parser.add_argument(
        "--entrants",
        nargs="+",
        metavar="NAME",
        help=f"{OURS} (all backends), {OURS}:BACKEND, {', '.join(PEERS)}; default: all",
    )
    parser.add_argument("--round-ms", type=float, default=60.0, help="of one entrant; at least one call")
    parser.add_argument("--threads", type=int, help="of the CPU")
    least = {"rounds": 1, "round_ms": 0, "threads": 1, "documents": 1}
    options = checked_options(parser, least, {"threads": os.cpu_count() or 1})
    for name in options.entrants or ():
        if name not in entrant_names() and name != OURS:
            parser.error(f"--entrants {name}: {OURS}, {', '.join(entrant_names())} are allowed")
    return options


def parser_of_shapes(description: str | None, *, rounds: int, written: str) -> argparse.ArgumentParser:
    """Options of every benchmark over shapes, with defaults that fit the device."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--shapes", nargs="+", default=["A"] if cuda else ["CPU"], metavar="SHAPE")
    parser.add_argument(
        "--documents", type=int, metavar="MEDIAN", help="pack documents of random lengths with this median"
    )
    parser.add_argument("--device", type=usable_device, default="cuda:0" if cuda else "cpu")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="bfloat16" if cuda else "float32",
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {written}")
    return parser


def usable_device(text: str) -> torch.device:
    """The CPU, or a CUDA device that is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device not in (torch.device("cpu"), torch.device("cuda", device.index)):
        raise argparse.ArgumentTypeError(f"{text}: cpu, cuda or cuda:NUMBER is allowed; try --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices; "
            "try --device cpu"
        )
    return device


def checked_options(
    parser: argparse.ArgumentParser, least: dict[str, int], most: dict[str, int] | None = None
) -> argparse.Namespace:
    """The command line with shapes, numbers and folder checked; `least` and `most` bound the options."""
    options = parser.parse_args()
    for shape in options.shapes:
        if shape not in SHAPES and not is_shape(shape):
            parser.error(
                f"--shapes {shape}: {', '.join(SHAPES)} or six numbers from 1 to {LARGEST}, "
                "batch,tokens,heads,kv_heads,head_dim,window with kv_heads a divisor of heads, are allowed; "
                "try --shapes 1,8192,8,8,64,256"
            )
    for option, lowest in {**least, "seed": 0}.items():
        value, highest = getattr(options, option), (most or {}).get(option, LARGEST)
        if value is not None and not lowest <= value <= highest:  # also where it is NaN
            parser.error(
                f"--{option.replace('_', '-')} {value}: a number from {lowest} to {highest} is allowed"
            )
    options.dtype = getattr(torch, options.dtype)
    if options.out is not None:
        # Before the work, which may take hours.
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.out).close()
        except OSError as error:
            parser.error(f"--out {options.out}: a folder that can be written is allowed ({error.strerror})")
    return options


def is_shape(text: str) -> bool:
    """Whether the text is six numbers from 1 on, the fourth a divisor of the third."""
    sizes = text.split(",")
    if len(sizes) != 6 or not all(size.isdecimal() and 1 <= int(size) <= LARGEST for size in sizes):
        return False
    return int(sizes[2]) % int(sizes[3]) == 0


def sizes_of(shape: str) -> list[int]:
    """Batch, tokens, heads, key-value heads, head dimension and window."""
    return list(SHAPES[shape]) if shape in SHAPES else [int(size) for size in shape.split(",")]


def entrant_names() -> list[str]:
    """Ours and the peers, in the order of the table."""
    return [f"{OURS}:{backend}" for backend in MODULES] + list(PEERS)


def make_problem(name: str, options: argparse.Namespace) -> Problem:
    """The shape with its device, dtype and documents."""
    batch, tokens, heads, kv_heads, head_dim, window = sizes_of(name)
    documents_BT = None
    if options.documents is not None:
        documents_BT = draw_documents(batch, tokens, options.documents, options.seed).to(options.device)
    return Problem(
        name=name,
        batch=batch,
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        device=options.device,
        dtype=options.dtype,
        documents=documents_BT,
    )


def draw_documents(batch: int, tokens: int, median: int, seed: int) -> Tensor:
    """Documents of log-normal lengths (sigma 1, like web text), cut at the row's end; int32 [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        lengths = (median * torch.randn(tokens, generator=generator).exp()).long().clamp(min=1)
        ends = lengths.cumsum(0)
        rows.append(torch.searchsorted(ends, torch.arange(tokens), right=True))
    return torch.stack(rows).int()


def benchmark(problem: Problem, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check and time all entrants at one shape, print the table, and return it."""
    torch.manual_seed(options.seed)
    inputs = draw_inputs(problem)
    chosen = f"{OURS}:{choose_backend('auto', request_of(problem)).name}"
    names = [
        name
        for name in entrant_names()
        if options.entrants is None or name in options.entrants or name.split(":")[0] in options.entrants
    ]
    entrants = []
    for name in names:
        entrant = prepare(name, problem, inputs)
        entrants.append(entrant)
        console.print(
            f"{problem.name} {name}: {entrant.problem or 'ready'}, {entrant.setup_s:.1f} s",
            style="dim",
            markup=False,
            highlight=False,
        )
    matmul_tflops, sensors = time_rounds(entrants, inputs, problem, options)
    shape = summary(problem, entrants, matmul_tflops, chosen) | sensors
    console.print(table_of(shape))
    return shape


def draw_inputs(problem: Problem) -> Inputs:
    """Query, key and value that require gradients, and the gradient of the output."""

    def normal(heads: int) -> Tensor:
        shape = (problem.batch, problem.tokens, heads, problem.head_dim)
        try:
            return torch.randn(shape, device=problem.device, dtype=problem.dtype)
        except RuntimeError as error:
            raise UserError(
                f"--shapes {problem.name}: its tensors do not fit in memory ({one_line(error)})"
            ) from None

    query_BTHD, key_BTKD, value_BTKD = (
        normal(heads).requires_grad_() for heads in (problem.heads, problem.kv_heads, problem.kv_heads)
    )
    return query_BTHD, key_BTKD, value_BTKD, normal(problem.heads)


def request_of(problem: Problem) -> Request:
    """What a backend of ours must be able to do."""
    return Request(
        device=problem.device.type,
        compute_capability=compute_capability(problem.device),
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        groups=problem.heads // problem.kv_heads,
        window=problem.window,
        documents=problem.documents is not None,
    )


def prepare(name: str, problem: Problem, inputs: Inputs) -> Entrant:
    """Build the entrant, compare it with float64 and measure its memory; failures become its `problem`."""
    entrant, started = Entrant(name), time.perf_counter()
    try:
        entrant.attend = ours(name, problem) if name.startswith(f"{OURS}:") else PEERS[name](problem)
        if not finite_everywhere(entrant, inputs):
            entrant.attend, entrant.problem = None, "wrong: its output or gradients hold NaN or infinity"
        elif not (error := error_against_float64(entrant, problem, inputs)) <= WRONG:
            entrant.attend, entrant.problem = None, "wrong: it errs too much to be this function"
            entrant.error = error if math.isfinite(error) else None
        else:
            entrant.error, entrant.memory_mib = error, peak_memory_mib(entrant, inputs)
    except ImportError as error:
        entrant.attend, entrant.problem, entrant.absent = None, f"not installed: {one_line(error)}", True
    except UnsupportedError as error:
        entrant.attend, entrant.problem, entrant.absent = None, f"unsupported: {error}", True
    except Exception as error:  # a peer that fails is a row of the table
        entrant.attend, entrant.problem = None, one_line(error)
    entrant.setup_s = time.perf_counter() - started
    return entrant


def one_line(error: Exception) -> str:
    """The kind of error and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def ours(name: str, problem: Problem) -> Attend:
    """One of our backends; the visibility is built once, as once a batch in a model."""
    backend = name.removeprefix(f"{OURS}:")
    refusal = capabilities(backend).refusal(request_of(problem))
    if refusal is not None:
        raise UnsupportedError(refusal)
    if backend == "reference" and problem.tokens > REFERENCE_LIMIT:
        raise UnsupportedError(f"it makes a T x T tensor; up to {REFERENCE_LIMIT} tokens are timed")
    visibility = Visibility.build(window=problem.window, documents_BT=problem.documents)

    def attend(query_BTHD: Tensor, key_BTKD: Tensor, value_BTKD: Tensor) -> Tensor:
        return attention(query_BTHD, key_BTKD, value_BTKD, visibility, backend=backend)

    return attend


def step(attend: Attend, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and gradients of query, key and value."""
    *heads, gradient_BTHD = inputs
    output_BTHD = attend(*heads)
    return output_BTHD.detach(), torch.autograd.grad(output_BTHD, heads, gradient_BTHD)


def forward_only(attend: Attend, inputs: Inputs) -> Tensor:
    """The output where no gradient is asked for."""
    with torch.no_grad():
        return attend(*(tensor.detach() for tensor in inputs[:3]))


def finite_everywhere(entrant: Entrant, inputs: Inputs) -> bool:
    """Whether no number of output and gradients is NaN or infinite; without gradients where it has none."""
    assert entrant.attend is not None
    try:
        output, gradients = step(entrant.attend, inputs)
    except (ImportError, UnsupportedError):
        raise
    except Exception as error:
        # Not before: compiled entrants would compile twice.
        output, gradients = forward_only(entrant.attend, inputs), ()
        entrant.backward, entrant.problem = False, f"backward: {one_line(error)}"
    return all(bool(tensor.isfinite().all()) for tensor in (output, *gradients))


def error_against_float64(entrant: Entrant, problem: Problem, inputs: Inputs) -> float:
    """Largest error of output, dq, dk and dv over plain PyTorch's; NaN where any of them is.

    Of the first queries, the last, and some in the middle, where kernels take other paths than at the ends.
    The gradient of all other outputs is zero, so that a piece of the keys is enough for the reference.
    """
    assert entrant.attend is not None
    tokens, window = problem.tokens, tokens_seen(entrant.name, problem)
    count = min(CHECKED_QUERIES, tokens)
    errors = []
    for first in {0, (tokens - count) // 2, tokens - count}:
        queries, keys = slice(first, first + count), slice(max(0, first - window + 1), first + count)
        query_BTHD, key_BTKD, value_BTKD, gradient_BTHD = inputs
        some_BTHD = torch.zeros_like(gradient_BTHD)
        some_BTHD[:, queries] = gradient_BTHD[:, queries]
        if entrant.backward:
            output, gradients = step(entrant.attend, (query_BTHD, key_BTKD, value_BTKD, some_BTHD))
        else:
            output, gradients = forward_only(entrant.attend, inputs), ()
        places = (queries, queries, keys, keys)
        for row in range(problem.batch):
            visible_TS = visible(problem, window, row, queries, keys)
            pieces = [
                query_BTHD[row, queries],
                key_BTKD[row, keys],
                value_BTKD[row, keys],
                some_BTHD[row, queries],
            ]
            exact = dense([piece.detach().double() for piece in pieces], visible_TS)
            plain = dense([piece.detach() for piece in pieces], visible_TS)
            for got, place, wanted, usual in zip((output, *gradients), places, exact, plain, strict=False):
                errors.append(over_plain(got[row, place], wanted, usual))
    # Not max() of Python, which passes over NaN.
    return float(torch.stack(errors).max())


def over_plain(got: Tensor, wanted: Tensor, usual: Tensor) -> Tensor:
    """Error over that of plain PyTorch; where that is exact, over what D products of size 1 may be off by."""
    error, of_plain = (got.double() - wanted).norm(), (usual.double() - wanted).norm()
    accumulated = torch.promote_types(got.dtype, torch.float32)
    rounding = 2 * torch.finfo(accumulated).eps * wanted.numel() ** 0.5
    return error / torch.where(of_plain > 0, of_plain, rounding)


def tokens_seen(name: str, problem: Problem) -> int:
    """The window, which those that have none ignore."""
    return problem.tokens if name in FULL else problem.window


def visible(problem: Problem, window: int, row: int, queries: slice, keys: slice) -> Tensor:
    """Which of a piece's keys each of its queries sees, bool [T, S]."""
    positions_1T = torch.arange(problem.tokens, device=problem.device)[None]
    documents_BT = problem.documents
    if documents_BT is None:
        documents_BT = torch.zeros(problem.batch, problem.tokens, dtype=torch.int32, device=problem.device)
    return Visibility.build(
        window=window,
        positions_BT=positions_1T[:, queries],
        documents_BT=documents_BT[row : row + 1, queries],
        key_positions_BS=positions_1T[:, keys],
        key_documents_BS=documents_BT[row : row + 1, keys],
    ).mask(queries.stop - queries.start, keys.stop - keys.start, problem.device)[0]


def dense(pieces: list[Tensor], visible_TS: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of attention as anyone would write it, in the dtype of the pieces."""
    query_THD, key_SKD, value_SKD, gradient_THD = pieces
    heads = [tensor.requires_grad_() for tensor in (query_THD, key_SKD, value_SKD)]
    groups = query_THD.shape[1] // key_SKD.shape[1]
    query_HTD = query_THD.transpose(0, 1)
    key_HSD, value_HSD = (
        tensor.repeat_interleave(groups, 1).transpose(0, 1) for tensor in (key_SKD, value_SKD)
    )
    scores_HTS = query_HTD @ key_HSD.mT * query_THD.shape[-1] ** -0.5
    weights_HTS = scores_HTS.masked_fill(~visible_TS, -torch.inf).softmax(-1)
    output_THD = (weights_HTS @ value_HSD).transpose(0, 1)
    return output_THD.detach(), *torch.autograd.grad(output_THD, heads, gradient_THD)


def peak_memory_mib(entrant: Entrant, inputs: Inputs) -> float | None:
    """Most memory that one pass takes beyond what is held before it; None where it cannot be told."""
    assert entrant.attend is not None

    def run() -> None:
        assert entrant.attend is not None
        if entrant.backward:
            step(entrant.attend, inputs)
        else:
            forward_only(entrant.attend, inputs)

    if inputs[0].device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    try:
        # Linux: freed memory goes back, and the peak starts anew.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        held = resident_kib("VmRSS")
        run()
        return (resident_kib("VmHWM") - held) / 2**10
    except (OSError, AttributeError):
        return None


def resident_kib(counter: str) -> int:
    """A counter of this process's memory as Linux keeps it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{counter}:")).split()[1])


class Stopwatch:
    """Times pieces of work: on CUDA by events, with caches emptied and the host ahead of the device.

    `ahead` is how often a large tensor is written before a piece, about 0.1 ms each: once empties the caches,
    more give the host time to launch all of the piece.
    """

    def __init__(self, device: torch.device, *, ahead: int = 12) -> None:
        self.device, self.ahead = device, ahead
        if device.type == "cuda":
            self.emptied = torch.empty(2**28, dtype=torch.int8, device=device)

    def run(self, *works: Callable[[], object]) -> list[float]:
        """Milliseconds of each piece of work, done in this order."""
        if self.device.type != "cuda":
            spent = []
            for work in works:
                started = time.perf_counter()
                work()
                spent.append((time.perf_counter() - started) * 1e3)
            return spent
        events = []
        for work in works:
            for _ in range(self.ahead):
                self.emptied.zero_()
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [float(begin.elapsed_time(end)) for begin, end in events]


def time_rounds(
    entrants: list[Entrant], inputs: Inputs, problem: Problem, options: argparse.Namespace
) -> tuple[float, dict[str, Any]]:
    """Fill the entrants' times in turns; returns the matmul's TFLOP/s and the card's clock and power."""
    watch = Stopwatch(problem.device)
    size = 8192 if problem.device.type == "cuda" else 1024
    square = torch.randn(size, size, device=problem.device, dtype=problem.dtype)
    product = torch.empty_like(square)
    matmul_ms: list[float] = []
    chance = random.Random(options.seed)
    with sensors_of(problem.device) as sensors:
        for _ in range(options.rounds):
            for _ in range(3):
                matmul_ms += watch.run(lambda: torch.mm(square, square, out=product))
            for entrant in chance.sample(entrants, len(entrants)):
                if entrant.attend is not None:
                    time_entrant(entrant, inputs, watch, options.round_ms)
    return 2 * size**3 / statistics.median(matmul_ms) / 1e9, sensors


def time_entrant(entrant: Entrant, inputs: Inputs, watch: Stopwatch, round_ms: float) -> None:
    """One round: calls until the time is used, at least one; the first warms up and is not kept."""
    *heads, gradient_BTHD = inputs if entrant.backward else tuple(tensor.detach() for tensor in inputs)
    held: list[Tensor] = []

    def forward() -> None:
        assert entrant.attend is not None
        with torch.set_grad_enabled(entrant.backward):
            held[:] = [entrant.attend(*heads)]

    def backward() -> None:
        torch.autograd.grad(held.pop(), heads, gradient_BTHD)

    works = (forward, backward) if entrant.backward else (forward,)
    try:
        used = sum(watch.run(*works)) if not entrant.forward_ms or watch.device.type == "cuda" else 0.0
        while True:
            spent = watch.run(*works)
            entrant.forward_ms.append(spent[0])
            entrant.backward_ms += spent[1:]
            used += sum(spent)
            if used >= round_ms:
                return
    except Exception as error:
        entrant.attend, entrant.problem = None, one_line(error)
        entrant.forward_ms.clear()
        entrant.backward_ms.clear()


@contextmanager
def sensors_of(device: torch.device) -> Iterator[dict[str, Any]]:
    """Median clock (MHz), power (W) and temperature (C) while the block runs, where nvidia-smi tells."""
    found: dict[str, Any] = {}
    command = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,power.draw,temperature.gpu",
        "--format=csv,noheader,nounits",
    ]
    if device.type != "cuda":
        yield found
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        process = subprocess.Popen(
            [*command, "-lms", "100", "-i", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        yield found
        return
    try:
        yield found
    finally:
        process.terminate()
        rows = [line.split(",") for line in process.communicate()[0].splitlines() if line.count(",") == 2]
        for name, column in zip(
            ("clock_mhz", "power_w", "temperature_c"), zip(*rows, strict=True), strict=False
        ):
            numbers = [float(text) for text in column if text.strip().replace(".", "").isdecimal()]
            if numbers:
                found[name] = {"median": statistics.median(numbers), "max": max(numbers), "min": min(numbers)}


def summary(problem: Problem, entrants: list[Entrant], matmul_tflops: float, chosen: str) -> dict[str, Any]:
    """The shape and its rows as plain values; `ratio` is an entrant's time over that of auto's choice."""
    flop = 4 * problem.heads * problem.head_dim * pairs(problem)
    rows = [row_of(entrant, flop, matmul_tflops) for entrant in entrants]
    ours_ms = {row["name"]: row for row in rows}.get(chosen, {})
    for row in rows:
        for key in ("forward_ms", "backward_ms", "total_ms", "least_total_ms"):
            both = key in row and key in ours_ms
            row[key.removesuffix("_ms") + "_ratio"] = row[key] / ours_ms[key] if both else None
    documents = problem.documents
    return {
        "shape": problem.name,
        "batch": problem.batch,
        "tokens": problem.tokens,
        "heads": problem.heads,
        "kv_heads": problem.kv_heads,
        "head_dim": problem.head_dim,
        "window": problem.window,
        "documents": None if documents is None else int((documents.diff(dim=1) != 0).sum()) + problem.batch,
        "auto": chosen,
        "matmul_tflops": matmul_tflops,
        "rows": rows,
    }


def pairs(problem: Problem) -> int:
    """Visible pairs of query and key in the batch."""
    if problem.documents is None:
        return problem.batch * visible_pairs(problem.tokens, problem.window)
    lengths = [
        length
        for row_T in problem.documents.cpu()
        for length in torch.unique_consecutive(row_T, return_counts=True)[1].tolist()
    ]
    return sum(visible_pairs(length, problem.window) for length in lengths)


def row_of(entrant: Entrant, flop: int, matmul_tflops: float) -> dict[str, Any]:
    """Medians, minima and rates of one entrant."""
    row: dict[str, Any] = {
        "name": entrant.name,
        "problem": entrant.problem,
        "absent": entrant.absent,
        "error_over_plain": entrant.error,
        "setup_s": round(entrant.setup_s, 1),
        "memory_mib": entrant.memory_mib,
        "calls": len(entrant.forward_ms),
    }
    totals = [sum(pair) for pair in zip(entrant.forward_ms, entrant.backward_ms, strict=False)]
    for name, spent, work in (
        ("forward", entrant.forward_ms, 1.0),
        ("backward", entrant.backward_ms, 2.5),
        ("total", totals, 3.5),
    ):
        if spent:
            median = statistics.median(spent)
            tflops = work * flop / median / 1e9
            row |= {
                f"{name}_ms": median,
                f"least_{name}_ms": min(spent),
                f"{name}_tflops": tflops,
                f"{name}_share_of_matmul": tflops / matmul_tflops,
            }
    return row


def table_of(shape: dict[str, Any]) -> Table:
    """The rows for the terminal."""
    sizes = "x".join(str(shape[key]) for key in ("batch", "tokens", "heads", "kv_heads", "head_dim"))
    documents = "" if shape["documents"] is None else f", {shape['documents']} documents"
    clocks = "".join(
        f", {name} {shape[key]['median']:g} ({shape[key]['min']:g} to {shape[key]['max']:g}) {unit}"
        for name, key, unit in (("clock", "clock_mhz", "MHz"), ("power", "power_w", "W"))
        if key in shape
    )
    table = Table(
        title=f"{shape['shape']}: {sizes}, window {shape['window']}{documents}; "
        f"matmul {shape['matmul_tflops']:.3g} TFLOP/s{clocks}",
        caption="median (minimum) of ms; x: median of both passes together, over that of auto's choice (*); "
        "error: over plain PyTorch's",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("forward ms", "backward ms", "x", "TFLOP/s", "% matmul", "MiB", "error", "setup s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in shape["rows"]:
        if row["calls"] or not row["absent"]:
            table.add_row(*cells_of(row, row["name"] == shape["auto"]))
    return table


def cells_of(row: dict[str, Any], chosen: bool) -> list[str]:
    """One row of the table; rates as forward/backward."""

    def shown(key: str, pattern: str) -> str:
        return pattern.format(row[key]) if row.get(key) is not None else ""

    both = "backward_ms" in row
    return [
        row["name"] + (" *" if chosen else ""),
        shown("forward_ms", "{:.4g}") + shown("least_forward_ms", " ({:.4g})"),
        shown("backward_ms", "{:.4g}") + shown("least_backward_ms", " ({:.4g})"),
        shown("total_ratio", "{:.2f}") if both else shown("forward_ratio", "{:.2f} forward"),
        shown("forward_tflops", "{:.3g}") + shown("backward_tflops", "/{:.3g}"),
        shown("forward_share_of_matmul", "{:.0%}") + shown("backward_share_of_matmul", "/{:.0%}"),
        shown("memory_mib", "{:.0f}"),
        shown("error_over_plain", "{:.2f}"),
        shown("setup_s", "{:.1f}"),
        row["problem"] or "",
    ]


def write(report: dict[str, Any], folder: Path | None) -> None:
    """Write the report and its plot, where a folder is given."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    try:
        (folder / "attention.png").write_bytes(plot_of(report))
    except ModuleNotFoundError as missing:
        print(f"no plot: {missing}", file=sys.stderr)


def plot_of(report: dict[str, Any]) -> bytes:
    """PNG: milliseconds of forward and backward, one panel a shape."""
    import altair as alt
    import vl_convert

    panels = []
    for shape in report["shapes"]:
        values = [
            {
                "entrant": row["name"] if "backward_ms" in row else f"{row['name']} (forward alone)",
                "pass": name,
                "ms": row[f"{name}_ms"],
            }
            for row in shape["rows"]
            for name in ("forward", "backward")
            if f"{name}_ms" in row
        ]
        if not values:
            continue
        title = f"{shape['shape']}: {shape['tokens']:,} tokens, window {shape['window']:,}"
        panels.append(
            alt.Chart(alt.Data(values=values), title=title, width=260)
            .mark_bar()
            .encode(
                x=alt.X("ms:Q", title="ms (median)"),
                y=alt.Y("entrant:N", sort={"op": "sum", "field": "ms"}, title=None),
                color=alt.Color("pass:N", sort=["forward", "backward"], title=None),
                order=alt.Order("pass:N", sort="descending"),
            )
        )
    chart = alt.concat(
        *panels,
        columns=2,
        title=f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}",
    )
    png: bytes = vl_convert.vegalite_to_png(chart.to_json(), ppi=144)
    return png


def commit() -> str | None:
    """The commit that the script is of; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """The card's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version, or None."""
    if package == "torch":
        return str(torch.__version__)  # with the build, such as +cu130
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(exit_status(main))
