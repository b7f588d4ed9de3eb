"""Measure a training step of windowlm and of transformers' Mistral side by side, on a CPU or a GPU.

python scripts/benchmark_training.py
python scripts/benchmark_training.py --shape default --lengths 1024 4096 --precision 32-true --threads 2
python scripts/benchmark_training.py --shape speed --lengths 4096 65536 --memory --breakdown --out results
python scripts/benchmark_training.py --entrants 'windowlm loop' --levers

`windowlm` is the command line as users start it: Lightning, Hydra, loader, logging and all, told to take each
sequence for one document, as the peers do; `windowlm documents` packs documents as it does by default;
`windowlm loop` is a bare loop around the same model, loss and optimizer; `--levers` moves one thing of it at
a time, and so says what that gives. Every entrant is a process of its own. On a CPU they take turns, some
steps at a time, so that a busy neighbour meets them alike; on a GPU one follows the other. FLOPs are those of
the model, pairs inside the window only, the same for all; MFU divides by the dense bfloat16 peak that is
printed.

A shape is dim,layers,heads,kv_heads,head_dim,MLP,vocabulary,window,tokens of a sequence,tokens a step.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from benchmark_attention import PIPED_WIDTH, circumstances, one_line, sensors_of
from out_argument import out_folder
from rich.console import Console
from rich.table import Table
from synthetic_text import write_text
from training_entrants import (
    ATTENTION_OF_PEERS,
    DOCUMENTS,
    ENTRANTS,
    FLEX,
    FULL_PATH,
    LEARNING_RATE,
    LEVER_OF_LOOP,
    LOOP,
    Job,
    Shape,
)
from training_levers import LEVERS

from windowlm.model.cost import model_cost
from windowlm.training import peak_flops
from windowlm.training.config import Precision

SIZES = tuple(Shape.__dataclass_fields__)
SHAPES = {
    "speed": (768, 12, 12, 4, 64, 2048, 32768, 1024, 8192, 65536),
    "byte": (512, 12, 8, 2, 64, 1536, 256, 512, 4096, 65536),
    "default": (192, 4, 6, 2, 32, 512, 4096, 256, 1024, 1024),
    "tiny": (128, 4, 4, 2, 32, 352, 4096, 256, 1024, 1024),
}
PRECISIONS = [name for name in get_args(Precision) if name != "16-mixed"]
PACKAGES = ("torch", "triton", "transformers", "lightning", "windowlm")
SCRIPT = Path(__file__).with_name("training_entrants.py")
TEXT = "text"  # folder
SECONDS_BETWEEN_LOOKS = 0.05
MOST_SECONDS_TO_END = 120
EPOCH_TOKENS, FEWEST_TOKENS = 4_000_000, 300_000
STEPS_OF_BREAKDOWN = 5
ERROR = re.compile(r"(error|[\w.]*Error)\b")


class EntrantError(Exception):
    """An entrant's process ended before it was asked to."""


@dataclass
class Row:
    """One entrant at one length and precision.

    Attributes:
        seconds: of a step, one number for each round.
        model_flops_per_second: where the entrant counts its own, one number for each round.
        waiting: share of the time in which the loop waited for data, likewise.
        start_s: seconds from the start of the process to the end of the warm-up.
        compile_s: seconds that torch.compile took, in all.
        problem: why something is missing.
    """

    entrant: str
    shape: Shape
    precision: str
    seconds: list[float] = field(default_factory=list)
    model_flops_per_second: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    power_w: float | None = None
    start_s: float | None = None
    compile_s: float | None = None
    problem: str | None = None


class Entrant(Protocol):
    """A process that trains."""

    row: Row

    def warm_up(self) -> None:
        """Take the first steps, and wait."""

    def measure(self) -> None:
        """Take the steps of one round, add what they took to the row, and wait."""

    def close(self) -> None:
        """End the process."""


def main() -> int:
    """Run the command; 2 is the status of a user's mistake."""
    options = parse_options()
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    report: dict[str, Any] = {**circumstances(options.device, PACKAGES), **fixed_facts(options), "rows": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-training-") as folder:
        options.folder = Path(folder)
        options.text = write_training_text(options)
        for precision in options.precision:
            for length in options.lengths:
                shape = replace(options.shape, sequence_length=length)
                for row in measured(shape, precision, options, console):
                    report["rows"].append(facts_of(row, options))
                    write(report, options.out)
                console.print(table_of(report, shape, precision))
            report |= {"compared": compared(report["rows"])}
            if options.memory:
                report.setdefault("memory", {})[precision] = memory_by_length(precision, options)
            if options.breakdown:
                report.setdefault("breakdown", {})[precision] = break_down(precision, options)
            write(report, options.out)
    for comparison in report["compared"]:
        console.print(comparison, markup=False, highlight=False)
    for precision, rows in report.get("memory", {}).items():
        console.print(memory_table(precision, rows))
    for precision, broken_down in report.get("breakdown", {}).items():
        console.print(breakdown_table(precision, broken_down))
    return 0


def parse_options() -> argparse.Namespace:
    """Read the command line, with defaults that fit the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--shape", metavar="SHAPE", help=f"{', '.join(SHAPES)} or {len(SIZES)} numbers")
    parser.add_argument(
        "--lengths", nargs="+", type=int, metavar="T", help="tokens of a sequence, at the same tokens a step"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, metavar="NAME", help="of Lightning")
    parser.add_argument("--entrants", nargs="+", metavar="NAME", help=f"{', '.join(ENTRANTS)}; default: all")
    parser.add_argument("--rounds", type=int, default=10 if cuda else 5, help="each of some steps")
    parser.add_argument("--steps", type=int, default=10, help="of one round")
    parser.add_argument("--warmup", type=int, default=10, help="steps before the first round")
    parser.add_argument(
        "--compile-peers",
        choices=["auto", "on", "off"],
        default="auto",
        help="torch.compile for transformers; auto: on a GPU",
    )
    parser.add_argument(
        "--settings", nargs="+", default=[], metavar="KEY=VALUE", help="more settings of windowlm's runs"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory of one sequence, by length")
    parser.add_argument(
        "--breakdown", action="store_true", help="the step of windowlm loop by kernel, at the first length"
    )
    parser.add_argument(
        "--levers",
        nargs="*",
        metavar="NAME",
        help=f"also the loop with one lever moved: {', '.join(LEVERS)}; default: all of them",
    )
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=out_folder, metavar="FOLDER", help="write training.json and training.png"
    )
    options = parser.parse_args()
    check_options(options, parser, cuda)
    return options


def check_options(options: argparse.Namespace, parser: argparse.ArgumentParser, cuda: bool) -> None:
    """Refuse what cannot run, and put objects in the place of names."""
    on_gpu = options.device == "cuda"
    if on_gpu and not cuda:
        parser.error("--device cuda: this machine shows no CUDA GPU; try --device cpu")
    options.shape = shape_of(options.shape or ("speed" if on_gpu else "default"), parser)
    options.lengths = options.lengths or [options.shape.sequence_length]
    options.precision = options.precision or (["bf16-true", "bf16-mixed"] if on_gpu else ["32-true"])
    for option, number in {"rounds": 1, "steps": 1, "warmup": 1, "threads": 1}.items():
        if (value := getattr(options, option)) is not None and value < number:
            parser.error(f"--{option} {value}: a number from {number} on is allowed")
    for length in options.lengths:
        if length < 2:
            parser.error(f"--lengths {length}: a number from 2 on is allowed; try --lengths 1024")
    for name in options.entrants or ():
        if name not in ENTRANTS:
            parser.error(f"--entrants {name}: {', '.join(ENTRANTS)} are allowed")
        if name == FLEX and not on_gpu:
            parser.error(f"--entrants {name}: it runs on a GPU only; try --entrants 'transformers sdpa'")
    for name in options.levers or ():
        if name not in LEVERS:
            parser.error(f"--levers {name}: {', '.join(LEVERS)} are allowed")
    for word in options.settings:
        if "=" not in word:
            parser.error(f"--settings {word}: a setting is given as key=value; try --settings data.workers=2")
    if options.breakdown and not on_gpu:
        parser.error("--breakdown: it reads the kernels of a GPU; leave it away on a CPU")
    if options.memory and len(options.lengths) < 2:
        parser.error("--memory: a slope needs two lengths; try --lengths 1024 2048")
    options.entrants = options.entrants or [name for name in ENTRANTS if on_gpu or name != FLEX]
    if options.levers is not None:
        options.entrants += [LEVER_OF_LOOP + name for name in options.levers or LEVERS]
    options.compiled = options.compile_peers == "on" or (options.compile_peers == "auto" and on_gpu)
    options.device = torch.device("cuda:0" if on_gpu else "cpu")
    options.environment = dict(os.environ)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
        options.environment["OMP_NUM_THREADS"] = str(options.threads)


def shape_of(text: str, parser: argparse.ArgumentParser) -> Shape:
    """The shape of a name or of numbers."""
    numbers = SHAPES.get(text) or text.split(",")
    if len(numbers) != len(SIZES) or not all(str(number).isdecimal() for number in numbers):
        parser.error(
            f"--shape {text}: {', '.join(SHAPES)} or {len(SIZES)} whole numbers, {','.join(SIZES)}; "
            f"try --shape {','.join(map(str, SHAPES['tiny']))}"
        )
    shape = Shape(**dict(zip(SIZES, map(int, numbers), strict=True)))
    try:
        shape.model_config()
    except ValueError as error:
        parser.error(f"--shape {text}: {error}")
    if shape.vocabulary_size < 256 or shape.vocabulary_size == 257 or shape.tokens_per_step < 1:
        parser.error(
            f"--shape {text}: a vocabulary of 256 (bytes) or more than 257, and tokens a step from 1 on"
        )
    return shape


def fixed_facts(options: argparse.Namespace) -> dict[str, Any]:
    """What holds for all rows."""
    return {
        "peak_flops": peak_of(options),
        "steps_a_round": options.steps,
        "rounds": options.rounds,
        "peers_compiled": options.compiled,
        "settings": options.settings,
    }


def peak_of(options: argparse.Namespace) -> float | None:
    """Dense bfloat16 peak of the device in FLOPs/s, where it is known."""
    return peak_flops.dense_bf16_peak(peak_flops.device_name(options.device))


def write_training_text(options: argparse.Namespace) -> list[str]:
    """Text for the command lines, enough for an epoch of many steps; returns the settings that read it."""
    folder = options.folder / TEXT
    folder.mkdir()
    longest = max(options.lengths)
    steps = options.warmup + 2 * (options.rounds + 1) * options.steps
    tokens = min(EPOCH_TOKENS, steps * max(options.shape.tokens_per_step, longest))
    tokens = max(tokens, FEWEST_TOKENS, 4 * longest)
    return write_text(folder, options.shape.vocabulary_size, tokens, options.seed)


def measured(shape: Shape, precision: str, options: argparse.Namespace, console: Console) -> Iterable[Row]:
    """The rows of all entrants at one length, as they are ready."""
    if options.device.type == "cuda":
        for name in options.entrants:
            yield from measured_together([name], shape, precision, options, console)
    else:
        yield from measured_together(options.entrants, shape, precision, options, console)


def measured_together(
    names: list[str], shape: Shape, precision: str, options: argparse.Namespace, console: Console
) -> list[Row]:
    """Entrants that are alive at one time and take turns; what fails becomes its row's problem."""
    rows = [Row(name, shape, precision) for name in names]
    alive: list[Entrant] = []
    with ExitStack() as stack:
        for row in rows:
            entrant = start(row, options, turns=len(names) > 1)
            stack.callback(entrant.close)
            started = time.perf_counter()
            if attempt(row, entrant.warm_up):
                alive.append(entrant)
                row.start_s = time.perf_counter() - started
            said = row.problem or f"ready after {row.start_s:.1f} s"
            name = f"{shape.sequence_length} {precision} {row.entrant}"
            console.print(f"{name}: {said}", style="dim", markup=False, highlight=False)
        with sensors_of(options.device) as sensors:
            for _ in range(options.rounds):
                alive = [entrant for entrant in alive if attempt(entrant.row, entrant.measure)]
        if len(rows) == 1 and "power_w" in sensors:
            rows[0].power_w = sensors["power_w"]["median"]
    return rows


def attempt(row: Row, work: Any) -> bool:
    """Whether the work was done; why not is kept in the row."""
    try:
        work()
    except (EntrantError, OSError, ValueError) as error:
        row.problem = str(error) if isinstance(error, EntrantError) else one_line(error)
        return False
    return True


def start(row: Row, options: argparse.Namespace, *, turns: bool) -> Entrant:
    """The entrant's process, started."""
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    if row.entrant in (FULL_PATH, DOCUMENTS):
        return CommandLine(row, options, folder, turns=turns)
    return Worker(row, options, folder)


def job_of(row: Row, options: argparse.Namespace, **values: Any) -> Job:
    """What the entrant's process is told."""
    return Job(
        entrant=row.entrant,
        shape=asdict(row.shape),
        precision=row.precision,
        device=options.device.type,
        text=str(options.folder / TEXT),
        seed=options.seed,
        compiled=options.compiled and row.entrant in ATTENTION_OF_PEERS,
        **values,
    )


def launch(job: Job, options: argparse.Namespace, folder: Path, **streams: Any) -> "subprocess.Popen[str]":
    """Start the process of a job in its own folder; what it prints for people goes to a file there."""
    with (folder / "log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(asdict(job))],
            cwd=folder,
            env=options.environment,
            stderr=log,
            text=True,
            **streams,
        )


def last_words(folder: Path) -> str:
    """The last line that the process printed of an error, or else the last of all."""
    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip()[:300] for line in text.split("\n") if line.strip()]
    errors = [line for line in lines if ERROR.match(line)]
    return next(iter([*reversed(errors), *reversed(lines)]), "it ended without a word")


class Worker:
    """An entrant that is asked for steps over a pipe."""

    def __init__(self, row: Row, options: argparse.Namespace, folder: Path) -> None:
        self.row, self.options, self.folder = row, options, folder
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = launch(job_of(row, options), options, folder, **pipes)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # its last words say why
            print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            raise EntrantError(last_words(self.folder))
        found: dict[str, Any] = json.loads(answer)
        return found

    def warm_up(self) -> None:
        """Compile, settle, and count memory from then on."""
        self.ask(steps=self.options.warmup)
        self.ask(reset_peak_memory=True)

    def measure(self) -> None:
        """One round."""
        answer = self.ask(steps=self.options.steps)
        self.row.seconds.append(answer["seconds"] / self.options.steps)
        self.row.peak_memory_bytes = answer["peak_memory_bytes"]
        self.row.compile_s = answer["compile_s"]

    def close(self) -> None:
        """Its loop ends with its input."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        end(self.process)


class CommandLine:
    """``python train.py``, whose rows of metrics are read while it runs; one row is one round.

    Where entrants take turns, its process is stopped and continued: a row that was interrupted is not used.
    """

    def __init__(self, row: Row, options: argparse.Namespace, folder: Path, *, turns: bool) -> None:
        self.row, self.folder, self.turns = row, folder, turns
        self.metrics = folder / "run" / "metrics.jsonl"
        self.compile_file = folder / "compile"
        self.warm_rows = -(-options.warmup // options.steps)
        job = job_of(
            row,
            options,
            overrides=tuple(overrides_of(row, options, folder)),
            compile_file=str(self.compile_file),
        )
        self.process = launch(job, options, folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.used = 0

    def warm_up(self) -> None:
        """Wait for the first rows."""
        self.wait_for(self.warm_rows)

    def measure(self) -> None:
        """Wait for a row that nothing interrupted."""
        if self.turns:
            self.process.send_signal(signal.SIGCONT)
        row = self.wait_for(self.used + (2 if self.turns else 1))
        self.row.seconds.append(self.row.shape.tokens / row["tokens_per_second"])
        self.row.model_flops_per_second.append(row["model_flops_per_second"])
        self.row.waiting.append(row["data_wait_fraction"])
        self.row.peak_memory_bytes = row["peak_memory_bytes"]

    def wait_for(self, count: int) -> dict[str, Any]:
        """Let it run until there are so many rows, and return the last of them."""
        while len(rows := self.rows()) < count:
            if self.process.poll() is not None:
                raise EntrantError(last_words(self.folder))
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if self.turns:
            self.process.send_signal(signal.SIGSTOP)
            self.used = len(self.rows())
        else:
            self.used = count
        return rows[count - 1]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of training so far, without those of validations."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").split("\n")[:-1]
        return [row for row in map(json.loads, lines) if "tokens_per_second" in row]

    def close(self) -> None:
        """Stop it as a user would, which saves its state."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGCONT)
        end(self.process)
        if self.compile_file.exists():
            self.row.compile_s = json.loads(self.compile_file.read_text(encoding="utf-8"))


def end(process: "subprocess.Popen[str]") -> None:
    """Wait for the process, not for ever."""
    try:
        process.wait(MOST_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def overrides_of(row: Row, options: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of a run: the shape, the text, and more steps than will be asked for."""
    shape = row.shape
    steps = options.warmup + 2 * (options.rounds + 2) * options.steps
    return [
        *(f"model.{name}={size}" for name, size in shape.sizes_of_model().items()),
        f"model.qk_norm={str(shape.model_config().qk_norm).lower()}",
        *options.text,
        f"data.sequence_length={shape.sequence_length}",
        f"data.batch_size={shape.batch}",
        f"data.document_masking={str(row.entrant == DOCUMENTS).lower()}",
        f"data.cache_dir={options.folder / 'cache'}",
        f"precision={row.precision}",
        f"seed={options.seed}",
        f"run_dir={folder / 'run'}",
        "optimizer=adamw",
        f"optimizer.lr={LEARNING_RATE}",
        # Validations and saves stand aside: rows leave the first out, and would hold the second.
        f"trainer.max_steps={100 * steps}",
        f"checkpoint.every_n_steps={100 * steps}",
        f"trainer.log_every_n_steps={options.steps}",
        f"trainer.device={options.device.type}",
        "trainer.progress_bar=off",
        "evaluation.context_lengths=[16]",
        "evaluation.max_targets=256",
        "logger.mode=offline",
        *options.settings,
    ]


def facts_of(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """The row as plain values: medians and minima, rates and shares."""
    shape = row.shape
    facts: dict[str, Any] = {
        "entrant": row.entrant,
        "precision": row.precision,
        **asdict(shape),
        "batch": shape.batch,
        "problem": row.problem,
        "start_s": row.start_s,
        "compile_s": row.compile_s,
        "rounds_s": row.seconds,
    }
    if not row.seconds:
        return facts
    seconds = statistics.median(row.seconds)
    flops_per_second = flops_per_token(shape) * shape.tokens / seconds
    if row.model_flops_per_second:
        flops_per_second = statistics.median(row.model_flops_per_second)
    peak = peak_of(options)
    watts = row.power_w
    return facts | {
        "step_s": seconds,
        "least_step_s": min(row.seconds),
        "tokens_per_second": shape.tokens / seconds,
        "most_tokens_per_second": shape.tokens / min(row.seconds),
        "model_flops_per_second": flops_per_second,
        "mfu": flops_per_second / peak if peak else None,
        "peak_memory_bytes": row.peak_memory_bytes,
        "power_w": watts,
        "joules_per_million_tokens": watts * seconds / shape.tokens * 1e6 if watts else None,
        "data_wait_fraction": statistics.median(row.waiting) if row.waiting else None,
    }


def flops_per_token(shape: Shape) -> float:
    """Model FLOPs a token, forward and backward, pairs inside the window only."""
    config = shape.model_config()
    return model_cost(config, shape.vocabulary_size, shape.sequence_length, 4).flops_per_token


def rows_at(rows: list[dict[str, Any]], length: int, precision: str) -> dict[str, dict[str, Any]]:
    """Rows of one length and precision that were timed, by entrant."""
    return {
        row["entrant"]: row
        for row in rows
        if (row["sequence_length"], row["precision"]) == (length, precision) and "step_s" in row
    }


def compared(rows: list[dict[str, Any]]) -> list[str]:
    """The ratios that the rows are measured for, in words."""
    said = []
    keys = list(dict.fromkeys((row["sequence_length"], row["precision"]) for row in rows))
    for length, precision in keys:
        found, place = rows_at(rows, length, precision), f"T={length:,} {precision}"
        if LOOP in found:
            said += [
                f"{place}: {name} takes {ratio_of(row, found[LOOP])} as long as {LOOP}"
                for name, row in found.items()
                if name.startswith(LEVER_OF_LOOP)
            ]
        if FULL_PATH not in found:
            continue
        ours = found[FULL_PATH]
        for name in (name for name in ATTENTION_OF_PEERS if name in found):
            said.append(f"{place}: {FULL_PATH} is {ratio_of(found[name], ours)} as fast as {name}")
        if LOOP in found:
            said.append(f"{place}: {FULL_PATH} takes {ratio_of(ours, found[LOOP])} as long as {LOOP}")
    for precision in dict.fromkeys(precision for _, precision in keys):
        lengths = [length for length, other in keys if other == precision]
        for name in ENTRANTS:
            rates = [
                (length, found[name]["model_flops_per_second"])
                for length in lengths
                if name in (found := rows_at(rows, length, precision))
            ]
            for length, rate in rates[1:]:
                first, base = rates[0]
                share = f"{rate / base:.3f} of its model FLOP/s"
                said.append(f"{precision} {name}: at T={length:,} {share} at T={first:,}")
    return said


def ratio_of(slower: dict[str, Any], faster: dict[str, Any]) -> str:
    """How many times as long a step of the one takes: by medians, within each round, and by the best rounds.

    Within a round neighbours are in time what they are in the list, where entrants take turns.
    """
    medians, best = (slower[key] / faster[key] for key in ("step_s", "least_step_s"))
    pairs = zip(slower["rounds_s"], faster["rounds_s"], strict=False)
    paired = statistics.median(one / other for one, other in pairs)
    return f"{medians:.3f} times (round by round {paired:.3f}, best rounds {best:.3f})"


def memory_by_length(precision: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of one sequence by its length, and bytes a token between two lengths."""
    found: list[dict[str, Any]] = []
    for length in sorted(options.lengths):
        shape = replace(options.shape, sequence_length=length, tokens_per_step=length)
        row = Row(LOOP, shape, precision)
        worker = Worker(row, options, Path(tempfile.mkdtemp(dir=options.folder)))
        answer: dict[str, Any] = {}
        try:
            worker.ask(steps=2)
            worker.ask(reset_peak_memory=True)
            answer = worker.ask(steps=2)
        except EntrantError as error:
            row.problem = str(error)
        finally:
            worker.close()
        entry = {
            "length": length,
            "peak_memory_bytes": answer.get("peak_memory_bytes"),
            "problem": row.problem,
        }
        before = found[-1] if found else {"peak_memory_bytes": None, "length": 0}
        if entry["peak_memory_bytes"] is not None and before["peak_memory_bytes"] is not None:
            grown = entry["peak_memory_bytes"] - before["peak_memory_bytes"]
            entry["bytes_per_token"] = grown / (length - before["length"])
        found.append(entry)
    return found


def break_down(precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Kernels of the bare loop at the first length beside their floors."""
    shape = replace(options.shape, sequence_length=options.lengths[0])
    worker = Worker(Row(LOOP, shape, precision), options, Path(tempfile.mkdtemp(dir=options.folder)))
    try:
        worker.warm_up()
        return {"sequence_length": shape.sequence_length, **worker.ask(breakdown=STEPS_OF_BREAKDOWN)}
    except EntrantError as error:
        return {"sequence_length": shape.sequence_length, "problem": str(error)}
    finally:
        worker.close()


def table_of(report: dict[str, Any], shape: Shape, precision: str) -> Table:
    """The rows of one length and precision for the terminal."""
    peak = report["peak_flops"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in shape.sizes_of_model().items())
    table = Table(
        title=f"{precision}, {shape.batch} x {shape.sequence_length:,} tokens a step, {sizes}, "
        f"vocabulary {shape.vocabulary_size:,}; peak "
        + (f"{peak / 1e12:,.0f} TFLOP/s (dense bf16)" if peak else "not known, so no MFU"),
        caption="median (best) over rounds; x: time over that of windowlm; TFLOP/s: model FLOPs, in-window",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    headings = ("tokens/s", "step ms", "x", "MFU", "TFLOP/s", "GiB", "J/M tokens", "compile s", "waiting")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    at_hand = (shape.sequence_length, precision)
    ours = rows_at(report["rows"], *at_hand).get(FULL_PATH)
    for row in report["rows"]:
        if (row["sequence_length"], row["precision"]) == at_hand:
            table.add_row(*cells_of(row, ours))
    return table


def cells_of(row: dict[str, Any], ours: dict[str, Any] | None) -> list[str]:
    """One row of the table."""

    def shown(key: str, pattern: str, unit: float = 1.0) -> str:
        return pattern.format(row[key] / unit) if row.get(key) is not None else ""

    both = ours is not None and "step_s" in row
    return [
        row["entrant"],
        shown("tokens_per_second", "{:,.0f}") + shown("most_tokens_per_second", " ({:,.0f})"),
        shown("step_s", "{:.4g}", 1e-3) + shown("least_step_s", " ({:.4g})", 1e-3),
        f"{row['step_s'] / ours['step_s']:.2f}" if both and ours is not None else "",
        shown("mfu", "{:.1%}"),
        shown("model_flops_per_second", "{:.3g}", 1e12),
        shown("peak_memory_bytes", "{:.2f}", 2**30),
        shown("joules_per_million_tokens", "{:,.0f}"),
        shown("compile_s", "{:.1f}"),
        shown("data_wait_fraction", "{:.1%}"),
        row["problem"] or "",
    ]


def memory_table(precision: str, rows: list[dict[str, Any]]) -> Table:
    """Memory by length for the terminal."""
    table = Table("T", "peak GiB", "bytes a token since the last", "note", title=f"{precision}, one sequence")
    for row in rows:
        held, slope = row["peak_memory_bytes"], row.get("bytes_per_token")
        table.add_row(
            f"{row['length']:,}",
            "" if held is None else f"{held / 2**30:.3f}",
            "" if slope is None else f"{slope:,.0f}",
            row["problem"] or "",
        )
    return table


def breakdown_table(precision: str, found: dict[str, Any]) -> Table:
    """Groups of kernels beside their floors for the terminal."""
    title = f"{precision}, T={found['sequence_length']:,}: step of {LOOP}"
    if "breakdown" not in found:
        return Table(title=f"{title}: {found['problem']}")
    measured_ms, floors = found["breakdown"], found["floors"]
    table = Table("", "ms", "floor ms", "over floor", "kernels", title=title)
    groups = measured_ms["groups"]
    for name, group in groups.items():
        over = f"{group['ms'] / floors[name]:.2f}" if floors[name] else ""
        table.add_row(name, f"{group['ms']:.2f}", f"{floors[name]:.2f}", over, f"{group['kernels']:.0f}")
    floor = sum(floors[name] for name in groups)
    wall = measured_ms["wall_ms"]
    table.add_row("step", f"{wall:.2f}", f"{floor:.2f}", f"{wall / floor:.2f}", "")
    return table


def write(report: dict[str, Any], folder: Path | None) -> None:
    """Write the report and its plot, where a folder is given."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    try:
        (folder / "training.png").write_bytes(plot_of(report))
    except ModuleNotFoundError as missing:
        print(f"no plot: {missing}", file=sys.stderr)


def plot_of(report: dict[str, Any]) -> bytes:
    """PNG: tokens a second, one panel a length and precision."""
    import altair as alt
    import vl_convert

    panels = []
    for length, precision in dict.fromkeys(
        (row["sequence_length"], row["precision"]) for row in report["rows"]
    ):
        values = [
            {"entrant": name, "tokens/s": row["tokens_per_second"]}
            for name, row in rows_at(report["rows"], length, precision).items()
        ]
        if not values:
            continue
        panels.append(
            alt.Chart(alt.Data(values=values), title=f"{precision}, {length:,} tokens a sequence", width=320)
            .mark_bar()
            .encode(
                x=alt.X("tokens/s:Q", title="tokens/s (median)"),
                y=alt.Y("entrant:N", sort=list(ENTRANTS), title=None),
                color=alt.Color("entrant:N", sort=list(ENTRANTS), legend=None),
            )
        )
    title = f"{report['device']}, torch {report['versions']['torch']}"
    chart = alt.concat(*panels, columns=2, title=title)
    png: bytes = vl_convert.vegalite_to_png(chart.to_json(), ppi=144)
    return png


if __name__ == "__main__":
    sys.exit(main())
