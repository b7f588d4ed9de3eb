"""Kill small runs at random moments, resume them, and compare them bit for bit with undisturbed ones.

python scripts/kill_and_resume.py
python scripts/kill_and_resume.py --cases adamw,32-true,0,none muon,bf16-true,changed,wandb --kills 3
python scripts/kill_and_resume.py --device cuda --deterministic --cases adamw,bf16-mixed,2,none --kills 5

A case is an optimizer, a precision, how many processes load data, and a logger; `changed` draws how many
at each start. Every start is a process of its own. It is killed by SIGKILL: at a random time; a random while
after a step, a backward pass, a validation or the evaluation began; or exactly at a place where something is
half done, such as a checkpoint half written, its renames half made, a row of metrics half written, or a step
taken and not yet counted. No place is drawn again before all have been, and with W&B its own come first, so
that few kills try them all. A run that is finished is compared with one that nothing disturbed, and what W&B
holds of it, offline, with its own metrics; another one is started until the kills are spent. Gradient
accumulation is on, and dropout unless it is set to 0.
"""

import argparse
import itertools
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from out_argument import out_folder
from synthetic_text import BYTES, write_text

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.command_line import Invocation
from windowlm.config import TrainConfig, check_config
from windowlm.errors import UserError, exit_status
from windowlm.training import checkpoint_io, metrics_log, run, wandb_run
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.offline_wandb import history_differences
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance
from windowlm.training.same_run import differences

CASES = (
    "adamw,32-true,0,none",
    "adamw,32-true,2,none",
    "muon,32-true,4,none",
    "adamw,bf16-true,0,none",
    "muon,bf16-true,changed,none",
    "muon,bf16-mixed,changed,none",
    "adamw,32-true,changed,wandb",
)
ALLOWED = (
    ("adamw", "muon"),
    ("32-true", "bf16-mixed", "bf16-true", "16-mixed"),
    ("0", "2", "4", "changed"),
    ("none", "wandb"),
)
STEPS = 24
# Longest while, in seconds, between the beginning of a phase and the kill.
WHILE = 0.02
# How a run says where it goes on.
GOING_ON = r"going on from step ([\d,]+) of"
# Places of a method: the kill comes a while after it began, or exactly before or after it, or in its middle.
BEGUN, BEFORE, AFTER, HALF = "a while into", "before", "after", "half through"


@dataclass(frozen=True)
class Moment:
    """Where a process is killed.

    Args:
        name: what it is called in the report.
        owner: object that holds the function; None for a random time.
        attribute: name of the function.
        place: where in the function.
        calls: the kill comes at a random one of so many calls.
    """

    name: str
    owner: Any = None
    attribute: str = ""
    place: str = BEGUN
    calls: int = 1


MOMENTS = (
    Moment("random time"),
    Moment("random time"),
    Moment("random time"),
    Moment("forward pass", LanguageModelModule, "training_step", BEGUN, 20),
    Moment("backward pass", LanguageModelModule, "backward", BEGUN, 20),
    Moment("gradients clipped, step not taken", LanguageModelModule, "configure_gradient_clipping", AFTER, 9),
    Moment("step taken and not counted", LanguageModelModule, "optimizer_step", AFTER, 9),
    Moment("validation", LanguageModelModule, "validation_step", BEGUN, 12),
    Moment("validated, not saved", LanguageModelModule, "on_validation_epoch_end", AFTER, 3),
    Moment("checkpoint half written", checkpoint_io._HashingFile, "write", BEFORE, 90),
    Moment("checkpoint written, not renamed", checkpoint_io, "damage", BEFORE, 6),
    Moment("between or after the renames", Path, "replace", AFTER, 12),
    Moment("checkpoint saved, model not", run, "save_bundle", BEFORE, 4),
    Moment("model half saved", run, "save_bundle", BEGUN, 4),
    Moment("something written and not synced", os, "fsync", BEFORE, 9),
    Moment("row of metrics half written", metrics_log.MetricsLog, "write_all", HALF, 5),
    Moment("metrics cut back", metrics_log.MetricsLog, "cut_back", BEGUN, 1),
    Moment("evaluation", run, "evaluate_model", BEGUN, 1),
    Moment("evaluated, not recorded", run, "evaluate_model", AFTER, 1),
)
WANDB_MOMENTS = (
    Moment("W&B begun, history not rebuilt", wandb_run, "StepLogger", BEFORE, 1),
    Moment("row given to W&B", wandb_run.StepLogger, "log_metrics", BEGUN, 12),
    Moment("W&B not ended", wandb_run.WandbRun, "finish", BEFORE, 1),
    Moment("W&B being ended", wandb_run.WandbRun, "finish", BEGUN, 1),
    Moment("W&B ended, run not recorded", wandb_run.WandbRun, "finish", AFTER, 1),
)


# Of a place that is drawn and not reached, before all are drawn anew.
TRIES = 3
PLACE_AND_CALL = re.compile(r"(.+?)(?:@([1-9]\d*))?")


class Places:
    """Draw places without replacement until each was used, then all again.

    One that was not reached, as the run ended before it or had not been killed yet, is tried again behind
    another; not without end, as some are never reached by a run of a few steps. One of the first is tried
    again at once, as the next run is a new one, which comes by all of them.

    Args:
        moments: the places.
        draw: of what is random.
        first: further places, which are drawn before the others.
    """

    def __init__(self, moments: Sequence[Moment], draw: random.Random, first: Sequence[Moment] = ()) -> None:
        self.moments, self.random, self.first = moments, draw, first
        self._left: list[Moment] = []
        self._missed: Counter[Moment] = Counter()

    def draw(self) -> Moment:
        """The next place."""
        if not self._left:
            in_order = (self.moments, self.first)
            self._left = [place for some in in_order for place in self.random.sample(some, len(some))]
            self._missed.clear()
        return self._left.pop()

    def miss(self, moment: Moment) -> None:
        """Take a place back that was not reached."""
        self._missed[moment] += 1
        if self._left and self._missed[moment] < TRIES:
            left = len(self._left)
            self._left.insert(left if moment in self.first else self.random.randrange(left), moment)


def main() -> int:
    """Try all cases; 1 where a run came out different."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="OPTIMIZER,PRECISION,WORKERS,LOGGER")
    parser.add_argument("--kills", type=int, default=20, help="in each case")
    parser.add_argument(
        "--first",
        nargs="+",
        default=(),
        metavar="PLACE[@CALL]",
        help="where the first kills of each case come, such as 'step taken and not counted@5', the fifth one",
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--deterministic", action="store_true", help="trainer.deterministic, for a GPU")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="trainer.compile")
    parser.add_argument(
        "--dropout", type=float, default=0.2, help="on attention weights, which only some backends have"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=out_folder, metavar="FOLDER", help="write kill_and_resume.json")
    options = parser.parse_args()
    for case in options.cases:
        if tuple(case.split(",")) not in itertools.product(*ALLOWED):
            choices = "; ".join(" or ".join(names) for names in ALLOWED)
            parser.error(f"--cases {case}: four words are allowed: {choices}; try --cases {CASES[0]}")
    names = {moment.name for moment in (*MOMENTS, *WANDB_MOMENTS)}
    for place in options.first:
        if (found := PLACE_AND_CALL.fullmatch(place)) is None or found[1] not in names:
            parser.error(
                f"--first {place}: a place is allowed, with @CALL or not: {'; '.join(sorted(names))}"
            )
    if not 0 <= options.dropout < 1:
        parser.error(f"--dropout {options.dropout}: from 0 up to but not including 1 is allowed")
    for name in ("kills", "steps"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name} {number}: a number from 1 on is allowed; try --{name} 20")
    # Processes are forked, which only one thread survives, and no use of a GPU.
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        draw = random.Random(options.seed)
        reports = [Campaign(case, Path(folder, case), options, draw).report() for case in options.cases]
    report = {
        **provenance(),
        "device": device_name(torch.device(options.device)),
        "command": " ".join(["python", *sys.argv]),
        "kills": sum(len(case["kills"]) for case in reports),
        "runs": sum(case["runs"] for case in reports),
        "different": sum(len(case["differences"]) for case in reports),
        "cases": reports,
    }
    print(f"{report['kills']} kills, {report['runs']} runs, {report['different']} differences")
    if options.out is not None:
        write_atomically(options.out / "kill_and_resume.json", json_bytes(report))
    return 1 if report["different"] else 0


class Campaign:
    """The kills of one case.

    Args:
        case: optimizer, precision, workers and logger.
        folder: where its runs go.
        options: of the command line.
        draw: of all that is random.
    """

    def __init__(self, case: str, folder: Path, options: argparse.Namespace, draw: random.Random) -> None:
        self.case = case
        self.optimizer, self.precision, self.workers, self.logger = case.split(",")
        self.places = Places(MOMENTS, draw, first=WANDB_MOMENTS if self.logger == "wandb" else ())
        self.first = [self.named(place) for place in options.first]
        self.folder, self.options, self.draw = folder, options, draw
        (folder / "text").mkdir(parents=True)
        write_text(folder / "text", BYTES, 20_000, 0)

    def named(self, place: str) -> tuple[Moment, int | None]:
        """A place of `--first` and its call, if one is given."""
        found = PLACE_AND_CALL.fullmatch(place)
        assert found is not None
        named = next(moment for moment in (*MOMENTS, *WANDB_MOMENTS) if moment.name == found[1])
        return named, None if found[2] is None else int(found[2])

    def report(self) -> dict[str, Any]:
        """Kill until the kills are spent and the last run is finished.

        Raises:
            UserError: a run that nothing disturbs does not end well, as on a device that is not there.
        """
        started = time.monotonic()
        if self.start("undisturbed", None) != 0:
            raise UserError(f"{self.case}: {(self.folder / 'undisturbed.txt').read_text()[-2000:]}")
        self.seconds = time.monotonic() - started
        kills: list[dict[str, Any]] = []
        found: list[str] = []
        resumed_from: list[int] = []
        runs = 0
        while len(kills) < self.options.kills:
            runs += 1
            found += self.one_run(f"run {runs}", kills)
            screen = (self.folder / f"run {runs}.txt").read_text()
            resumed_from += [int(step.replace(",", "")) for step in re.findall(GOING_ON, screen)]
        print(f"{self.case}: {len(kills)} kills in {runs} runs, {len(found)} differences", flush=True)
        return {
            "case": self.case,
            "runs": runs,
            "kills": kills,
            "resumed_from": resumed_from,
            "differences": found,
        }

    def one_run(self, name: str, kills: list[dict[str, Any]]) -> list[str]:
        """Kill one run again and again, and compare it once it is finished."""
        status: int | None = None
        while status != 0:
            moment, call, drawn = None, None, False
            if len(kills) < self.options.kills:
                drawn = not self.first
                moment, call = (self.places.draw(), None) if drawn else self.first.pop(0)
            status = self.start(name, moment, call)
            if moment is not None and drawn and status != -signal.SIGKILL:
                self.places.miss(moment)
            if status == -signal.SIGKILL:
                assert moment is not None
                kills.append({"moment": moment.name, "run": name})
            elif status != 0:
                return [f"{name}: ended with {status}: {(self.folder / f'{name}.txt').read_text()[-2000:]}"]
        found = differences(self.folder / "undisturbed", self.folder / name)
        if self.logger == "wandb":
            found += history_differences(self.folder / name)
        return [f"{name}: {line}" for line in found]

    def start(self, name: str, moment: Moment | None, call: int | None = None) -> int:
        """Start a run in a process of its own, or go on with it; its status, negative for a signal."""
        workers = self.draw.choice((0, 2, 4)) if self.workers == "changed" else int(self.workers)
        if call is None:
            call = self.draw.randint(1, moment.calls) if moment is not None else 0
        share = self.draw.random()
        begun, begins = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(begun)
            self.in_child(name, workers, moment, call, share, begins)
        os.close(begins)
        if moment is not None and moment.place == BEGUN:
            if moment.owner is None:
                time.sleep(share * self.seconds)
                os.kill(child, signal.SIGKILL)
            elif select.select([begun], [], [])[0] and os.read(begun, 1):
                time.sleep(share * WHILE)
                os.kill(child, signal.SIGKILL)
        os.close(begun)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def in_child(
        self, name: str, workers: int, moment: Moment | None, call: int, share: float, begins: int
    ) -> None:
        """Train, and leave by a signal or a status."""
        status = 70
        try:
            if moment is not None and moment.owner is not None:
                arrange(moment, call, share, begins)
            screen = (self.folder / f"{name}.txt").open("a", buffering=1)  # a kill loses no line
            with screen, redirect_stdout(screen), redirect_stderr(screen):
                status = self.train(self.folder / name, workers)
        except BaseException as error:
            with (self.folder / f"{name}.txt").open("a") as screen:
                print(f"{type(error).__name__}: {error}", file=screen)
        finally:
            os._exit(status)

    def train(self, folder: Path, workers: int) -> int:
        """Train the small run in this process."""
        shape = {"layers": 1, "dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 16}
        values = {
            "model": {**shape, "window": 8, "attention_dropout": self.options.dropout},
            "data": {
                "name": "text",
                "path": str(self.folder / "text"),
                "cache_dir": str(self.folder / "cache"),
                "sequence_length": 64,
                "batch_size": 2,
                "validation_tokens": 512,
                "workers": workers,
            },
            "tokenizer": {"kind": "bytes"},
            "optimizer": {"kind": self.optimizer},
            "precision": self.precision,
            "trainer": {
                "max_steps": self.options.steps,
                "accumulate_batches": 2,
                "validate_every_n_steps": 5,
                "log_every_n_steps": 3,
                "progress_bar": "off",
                "device": self.options.device,
                "deterministic": self.options.deterministic,
                "compile": self.options.compile,
            },
            "checkpoint": {"every_n_steps": 2},
            "evaluation": {"max_targets": 64, "context_lengths": [2, 16]},
            "logger": {"kind": self.logger, "mode": "offline"},
            "resume": "auto",
            "run_dir": str(folder),
        }
        invocation = Invocation(
            output_dir=folder, sweep_dir=None, command=f"python train.py run_dir={folder}"
        )
        return run.train(check_config(TrainConfig, values), invocation)


def arrange(moment: Moment, call: int, share: float, begins: int) -> None:
    """Make this process tell that a phase has begun, or kill itself, at the given call of a function."""
    original: Callable[..., Any] = getattr(moment.owner, moment.attribute)
    calls = [0]

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] != call:
            return original(*arguments, **options)
        if moment.place == BEFORE:
            kill()
        if moment.place == HALF:
            log: metrics_log.MetricsLog = arguments[0]
            row = b"".join(log._unwritten)
            with log.path.open("ab") as file:
                file.write(row[: int(share * len(row))])
            kill()
        if moment.place == BEGUN:
            os.write(begins, b"x")
        result = original(*arguments, **options)
        if moment.place == AFTER:
            kill()
        return result

    setattr(moment.owner, moment.attribute, watched)


if __name__ == "__main__":
    sys.exit(exit_status(main))
