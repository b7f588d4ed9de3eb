"""Measure a training step on one GPU, and on several by ddp, fsdp2 and context beside the peers of context.

python scripts/benchmark_scaling.py --out docs/results/scaling_h100
python scripts/benchmark_scaling.py --entrants 'one long' context gather 'all-to-all over heads'
python scripts/benchmark_scaling.py --device cpu --shape tiny --lengths 256 1024 4096

Each entrant trains the model of the shape in processes of its own, one after the other. `one`, ddp and fsdp2
take the tokens of a step of the shape in each process; so do `torch ddp`, DistributedDataParallel around a
graph for each block, whose gradients travel in torch's buckets while the pass goes on, and `apart`, whose
processes share nothing but the machine: what it allows. `one long`, `context` and the peers take one sequence
of the second length together, `context longest` one of the third; the latter and `context checkpointed` keep
the inputs of blocks alone and compute the rest again. `context [1.008,1]` has parts that relate so, as many
as processes. `context in pieces` is cut where keys arrive, as the peers are. `torch ring` attends to all
earlier tokens, as it has no window. `one of documents` and `context of documents` have several in each row.
The GPUs of a host differ by some percent, and a step of several waits for the slowest: those of one run on
each in turn, and their mean and the slowest are told. All are bare loops (`scaling_entrants.py`). Before and
after a round the processes meet and a GPU waits for its host, which a round of few steps would count as the
price of sharing; and a GPU that is still cold is faster. With `--resume` a command that was ended goes on.

Bytes are those of keys, values, queries and outputs that all processes together send in the forward pass of a
step. Memory is that of the process with most of it. A shape is as in `benchmark_training.py`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from benchmark_attention import PIPED_WIDTH, circumstances
from benchmark_training import PACKAGES, SHAPES, last_words, shape_of
from context_peers import FULL, PEERS
from rich.console import Console
from rich.table import Table
from scaling_entrants import ALONE, APART, BY_ROWS, CONTEXT, DDP, FSDP2, TORCH_DDP, Job
from training_entrants import Shape

from windowlm.atomic_write import write_atomically
from windowlm.command_line import SHORT_WAITING
from windowlm.evaluation.precision import compute_dtype
from windowlm.parallel.launcher import free_port, threads_of_each
from windowlm.parallel.parts import parts_of

SCRIPT = Path(__file__).with_name("scaling_entrants.py")
REPORT = "scaling.json"
# Options that a report tells, beside the shape.
FACTS = ("processes", "lengths", "precision", "rounds", "steps", "warmup", "seed")
# What may differ between a command and the one that goes on with it, and what both add to.
DIFFERS = {"command", "load_before", "rows", "compared"}
SHORT, LONG, LONGEST = range(3)
DOCUMENTS_A_ROW = 8
SECONDS_BETWEEN_LOOKS = 0.05


@dataclass(frozen=True)
class Entrant:
    """How the work is shared, of sequences of which length, whether activations are checkpointed, whether the
    decoder is several graphs where it could be one, whether rows hold several documents, and how the parts
    relate where they are not equal.
    """

    share: str
    length: int
    checkpointed: bool = False
    in_pieces: bool = False
    documents: bool = False
    shares: tuple[float, ...] | None = None


ENTRANTS = {
    "one": Entrant(ALONE, SHORT),
    "apart": Entrant(APART, SHORT),
    "ddp": Entrant(DDP, SHORT),
    "torch ddp": Entrant(TORCH_DDP, SHORT),
    "fsdp2": Entrant(FSDP2, SHORT),
    "one long": Entrant(ALONE, LONG),
    "context": Entrant(CONTEXT, LONG),
    **{name: Entrant(name, LONG) for name in PEERS},
    "context in pieces": Entrant(CONTEXT, LONG, in_pieces=True),
    "one of documents": Entrant(ALONE, LONG, documents=True),
    "context of documents": Entrant(CONTEXT, LONG, documents=True),
    "context checkpointed": Entrant(CONTEXT, LONG, checkpointed=True),
    "context longest": Entrant(CONTEXT, LONGEST, checkpointed=True),
}
NUMBER = r"\d+(?:\.\d+)?"
OF_SHARES = re.compile(rf"context \[({NUMBER}(?:,{NUMBER})*)\]")
OVER_ONE = {
    "ddp": "one",
    "torch ddp": "one",
    "fsdp2": "one",
    "context": "one long",
    "context of documents": "one of documents",
}


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    options = parse_options()
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    facts = {name: getattr(options, name) for name in FACTS}
    report: dict[str, Any] = {**circumstances(options.device, PACKAGES), **facts, **asdict(options.shape)}
    report["gpus"] = gpus_of(options)
    try:
        rows = kept_rows(options.out / REPORT, report) if options.resume else []
    except ValueError as error:
        print(f"error: --resume: {error}", file=sys.stderr)
        return 2
    report["rows"], kept = rows, {row["entrant"] for row in rows}
    report["compared"] = compared({row["entrant"]: row for row in rows})
    for name in options.entrants:
        if name in kept:
            continue
        rows.append(row := measured(name, options))
        said = row["problem"] or f"{row['tokens_per_second']:,.0f} tokens/s, {row['wall_s']:.0f} s in all"
        console.print(f"{name}: {said}", style="dim", markup=False, highlight=False)
        report["compared"] = compared({row["entrant"]: row for row in rows})
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report, indent=1) + "\n"
            write_atomically(options.out / REPORT, text.encode())
    console.print(table_of(report))
    for comparison in report["compared"]:
        console.print(comparison, markup=False, highlight=False)
    return int(any(row["problem"] for row in rows))


def parse_options() -> argparse.Namespace:
    """Read the command line, with defaults that fit the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--processes", type=int, default=2, help="of the entrants that share")
    parser.add_argument(
        "--shape", default="speed" if cuda else "tiny", help=f"{', '.join(SHAPES)} or numbers"
    )
    parser.add_argument(
        "--lengths",
        nargs=3,
        type=int,
        metavar="T",
        help="short, long and longest; default: 8192 131072 1048576, on a CPU 256 1024 4096",
    )
    parser.add_argument(
        "--entrants",
        nargs="+",
        metavar="NAME",
        help=f"{', '.join(ENTRANTS)}, which is the default, or context [1.008,1]",
    )
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=40 if cuda else 10, help="of one round; slow entrants take one"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=40 if cuda else 5,
        help="steps before the first round; slow entrants take two",
    )
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that an entrant may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"write {REPORT}")
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"keep what {REPORT} has of this code, these options and GPUs, as of a command that was ended",
    )
    options = parser.parse_args()
    if options.resume and options.out is None:
        parser.error("--resume: --out says of which folder")
    on_gpu = options.device == "cuda"
    if on_gpu and torch.cuda.device_count() < options.processes:
        parser.error(
            f"--processes {options.processes}: this machine shows {torch.cuda.device_count()} GPUs, and each "
            "process takes one; try --device cpu"
        )
    options.shape = shape_of(options.shape, parser)
    options.lengths = options.lengths or ([8192, 131_072, 1_048_576] if on_gpu else [256, 1024, 4096])
    options.precision = options.precision or ("bf16-mixed" if on_gpu else "32-true")
    for option, least in {"processes": 2, "rounds": 1, "steps": 1, "warmup": 1}.items():
        if (value := getattr(options, option)) < least:
            parser.error(f"--{option} {value}: a number from {least} on is allowed")
    for length in options.lengths:
        if length < 1:
            parser.error(f"--lengths {length}: a number from 1 on is allowed")
    for length in options.lengths[LONG:]:
        if length % options.processes:
            good = -(-length // options.processes) * options.processes
            parser.error(
                f"--lengths {length}: {options.processes} processes share a sequence, and a multiple of "
                f"{options.processes} is allowed; try {good}"
            )
    options.entrants = options.entrants or list(ENTRANTS)
    for name in options.entrants:
        try:
            check_entrant(name, options.processes, options.lengths[LONG])
        except ValueError as error:
            parser.error(f"--entrants {name}: {error}")
    options.device = torch.device("cuda:0" if on_gpu else "cpu")
    return options


def check_entrant(name: str, processes: int, tokens: int) -> None:
    """Refuse what is no entrant for so many processes and tokens.

    Raises:
        ValueError: what is allowed.
    """
    try:
        shares = entrant_of(name).shares
    except KeyError:
        raise ValueError(f"{', '.join(ENTRANTS)} are allowed, or context [1.008,1]") from None
    if shares is not None:
        if min(shares) == 0:
            raise ValueError("numbers above 0 are allowed")
        if len(shares) != processes:
            raise ValueError(f"there are {processes} processes, and a number for each is allowed")
        parts_of(tokens, processes, shares)


def entrant_of(name: str) -> Entrant:
    """That of the name; of another the parts may relate as told."""
    if told := OF_SHARES.fullmatch(name):
        return replace(ENTRANTS["context"], shares=tuple(float(share) for share in told[1].split(",")))
    return ENTRANTS[name]


def gpus_of(options: argparse.Namespace) -> list[str]:
    """Which GPUs are measured."""
    if options.device.type != "cuda":
        return []
    return [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(options.processes)]


def kept_rows(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier command has measured of the same; entrants that had a problem are tried again.

    Raises:
        ValueError: it measured something else.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for name, value in json.loads(json.dumps(report)).items():
        if name not in DIFFERS and earlier.get(name) != value:
            raise ValueError(
                f"{path} has {name} {earlier.get(name)}, and here it is {value}; give another --out"
            )
    return [row for row in earlier["rows"] if not row["problem"]]


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of an entrant, whose `problem` says why it has no figures."""
    entrant = entrant_of(name)
    shape = shape_of_entrant(entrant, options)
    processes = 1 if entrant.share == ALONE else options.processes
    slow = entrant.length == LONGEST or entrant.share in FULL
    job = Job(
        share=entrant.share,
        shape=asdict(shape),
        precision=options.precision,
        device=options.device.type,
        seed=options.seed,
        warmup=min(options.warmup, 2) if slow else options.warmup,
        rounds=options.rounds,
        steps=1 if slow else options.steps,
        activation_checkpointing=entrant.checkpointed,
        in_pieces=entrant.in_pieces,
        documents=max(shape.sequence_length // DOCUMENTS_A_ROW, 1) if entrant.documents else 0,
        shares=entrant.shares,
    )
    started = time.monotonic()
    if entrant.share == ALONE and options.device.type == "cuda":
        answer, problem = mean_answer(job, options.processes, options.limit)
    else:
        answer, problem = answer_of(job, processes, options.limit)
    row = {"entrant": name, "share": entrant.share, "processes": processes, "problem": problem}
    row |= {"sequence_length": shape.sequence_length, "wall_s": time.monotonic() - started}
    if answer is None:
        return row
    by_rows = entrant.share in BY_ROWS
    tokens = shape.tokens * (processes if by_rows else 1)
    row |= {**answer, "tokens_per_step": tokens, "tokens_per_second": tokens / answer["step_s"]}
    if entrant.share == CONTEXT and not entrant.documents:
        parts = parts_of(shape.sequence_length, processes, entrant.shares)
        row["formula_bytes"] = halo_bytes(shape, parts, compute_dtype(options.precision).itemsize)
        row["parts"] = [part.stop - part.start for part in parts]
    return row


def shape_of_entrant(entrant: Entrant, options: argparse.Namespace) -> Shape:
    """The shape of one process's batch, or of the one sequence that all share."""
    length = options.lengths[entrant.length]
    tokens = options.shape.tokens_per_step if entrant.length == SHORT else length
    return replace(options.shape, sequence_length=length, tokens_per_step=tokens)


def halo_bytes(shape: Shape, parts: list[slice], number_bytes: int) -> int:
    """What all processes send forward for one row, as docs/scaling.md states it."""
    each = 2 * shape.kv_heads * shape.head_dim * number_bytes
    return shape.layers * each * sum(min(shape.window - 1, part.start) for part in parts)


def mean_answer(job: Job, gpus: int, limit: float) -> tuple[dict[str, Any] | None, str | None]:
    """What one process measured on each of the GPUs in turn, with the mean of their steps, or why not."""
    each: list[dict[str, Any]] = []
    for gpu in range(gpus):
        answer, problem = answer_of(replace(job, gpu=gpu), 1, limit)
        if answer is None:
            return None, problem
        each.append(answer)
    rounds, steps = ([answer[name] for answer in each] for name in ("rounds_s", "step_s"))
    return {**each[0], "rounds_s": rounds, "steps_s": steps, "step_s": statistics.mean(steps)}, None


def answer_of(job: Job, processes: int, limit: float) -> tuple[dict[str, Any] | None, str | None]:
    """What the leader of the job's processes measured, or why there is nothing."""
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as name:
        folders = [Path(name) / str(rank) for rank in range(processes)]
        # Threads as ``train.py`` has them: those that spin keep each other from the cores.
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(threads_of_each(processes)),
            **SHORT_WAITING,
        }
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank, folder in enumerate(folders):
                folder.mkdir()
                place = {
                    "RANK": rank,
                    "LOCAL_RANK": rank,
                    "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes,
                }
                environment = {key: str(value) for key, value in place.items()} if processes > 1 else {}
                with (folder / "answer").open("w") as answer, (folder / "log").open("w") as log:
                    command = [sys.executable, str(SCRIPT), json.dumps(asdict(job))]
                    started.append(
                        subprocess.Popen(
                            command,
                            env={**os.environ, **shared, **environment},
                            cwd=folder,
                            stdout=answer,
                            stderr=log,
                        )
                    )
            deadline = time.monotonic() + limit
            while any(process.poll() is None for process in started):
                failed = [rank for rank, process in enumerate(started) if process.poll()]
                if failed:
                    return None, last_words(folders[failed[0]])
                if time.monotonic() > deadline:
                    return None, f"not finished after --limit {limit:g} seconds"
                time.sleep(SECONDS_BETWEEN_LOOKS)
            text = (folders[0] / "answer").read_text()
            return (json.loads(text), None) if text else (None, last_words(folders[0]))
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait()


def compared(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The ratios that the rows are measured for, in words."""
    rows = {name: row for name, row in rows.items() if not row["problem"]}

    def pace(name: str, base: str) -> str:
        return f"{rows[name]['tokens_per_second'] / rows[base]['tokens_per_second']:.3f} times the tokens/s"

    def share(name: str, base: str, key: str) -> str:
        return f"{rows[name][key] / rows[base][key]:.3f} of the"

    said = []
    if {"apart", "one"} <= rows.keys():
        said.append(f"apart: {pace('apart', 'one')} of one")
    unequal = [name for name in rows if entrant_of(name).shares]
    for name, base in (OVER_ONE | dict.fromkeys(unequal, "one long")).items():
        if {name, base} <= rows.keys():
            said.append(
                f"{name}: {pace(name, base)} of {base}{over_slowest(rows[name], rows[base])}, "
                f"{share(name, base, 'peak_memory_bytes')} memory a process, "
                f"{share(name, base, 'state_bytes')} weights, gradients and optimizer state"
            )
    for name in unequal:
        if "context" in rows:
            said.append(f"{name}: {pace(name, 'context')} of context")
    for name in PEERS:
        for context in ("context", "context in pieces"):
            if {name, context} <= rows.keys():
                said.append(
                    f"{context}: {pace(context, name)} of {name}, "
                    f"{share(context, name, 'bytes_sent_forward')} bytes"
                )
    if {"context longest", "context checkpointed"} <= rows.keys():
        said.append(
            f"context longest: {pace('context longest', 'context checkpointed')} of context checkpointed"
        )
    return said


def over_slowest(row: dict[str, Any], one: dict[str, Any]) -> str:
    """The pace over that of the slowest GPU alone, in words, where several were measured."""
    if "steps_s" not in one:
        return ""
    slowest = one["tokens_per_step"] / max(one["steps_s"])
    return f" ({row['tokens_per_second'] / slowest:.3f} of the slowest GPU's)"


def table_of(report: dict[str, Any]) -> Table:
    """The rows for the terminal."""
    table = Table(
        title=f"{report['processes']} processes, {report['device']}, {report['precision']}, window "
        f"{report['window']:,}",
        caption=f"*: all earlier tokens ({', '.join(FULL)}); MB: sent forward by all in a step",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    numbers = ("T", "tokens/s", "step ms", "peak GiB", "state GiB", "MB", "formula MB", "first loss", "loss")
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in report["rows"]:

        def shown(key: str, pattern: str, unit: float = 1.0, row: dict[str, Any] = row) -> str:
            return pattern.format(row[key] / unit) if row.get(key) is not None else ""

        table.add_row(
            row["entrant"] + ("*" if row["share"] in FULL else ""),
            f"{row['sequence_length']:,}",
            shown("tokens_per_second", "{:,.0f}"),
            shown("step_s", "{:,.1f}", 1e-3),
            shown("peak_memory_bytes", "{:.2f}", 2**30),
            shown("state_bytes", "{:.3f}", 2**30),
            shown("bytes_sent_forward", "{:,.3f}", 1e6),
            shown("formula_bytes", "{:,.3f}", 1e6),
            shown("first_loss", "{:.5f}"),
            shown("loss", "{:.4f}"),
            row["problem"] or "",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
