"""Train a tiny model for many steps, and watch memory, handles, threads, the run's folder and compilation.

python scripts/soak.py
python scripts/soak.py --steps 10000 --layouts 1000 --out FOLDER

Resident memory must stay within 2% of what it was after the first 500 steps, file handles and threads must
stay the same, and the folder must hold the same files, of which metrics.jsonl alone grows, by a row each.
Then a compiled model with a windowed and a full layer trains on random divisions of its sequences into
documents, none of which may be compiled anew. Status 1 where one of these does not hold.

Shape letters: B sequences, T tokens.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from out_argument import out_folder
from synthetic_text import BYTES, write_text
from torch._dynamo.utils import counters

from windowlm.command_line import Invocation
from windowlm.config import TrainConfig, check_config
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training import run
from windowlm.training.compilation import forget_compiled, hidden_states
from windowlm.training.device_batch import visibilities_on
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance

MOST_GROWTH = 0.02
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SEQUENCES, TOKENS, VOCABULARY = 2, 256, 256
SHAPE = {"layers": 2, "dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 16}


class Watch(pl.Callback):
    """Look at this process and the run's folder every so many steps."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.seen: list[dict[str, int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Look."""
        step = pl_module.spent().steps
        if step % self.every == 0:
            files = [path for path in self.folder.rglob("*") if path.is_file()]
            logged = {self.folder / "metrics.jsonl"}
            self.seen.append(
                {
                    "step": step,
                    "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES,
                    "file_handles": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")),
                    "files": len(files),
                    "bytes_beside_metrics": sum(path.stat().st_size for path in files if path not in logged),
                }
            )


def main() -> int:
    """Train and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--settle", type=int, default=500, help="steps before memory must be flat")
    parser.add_argument("--layouts", type=int, default=1000, help="of documents, for the compiled model")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--out", type=out_folder, metavar="FOLDER", help="write soak.json")
    options = parser.parse_args()
    for name, least in (("steps", 1), ("settle", 0), ("layouts", 1), ("workers", 0)):
        if (number := getattr(options, name)) < least:
            parser.error(f"--{name} {number}: a number from {least} on is allowed")
    if options.settle > options.steps:
        parser.error(f"--settle {options.settle}: at most {options.steps} is allowed, the number of --steps")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        seen = soak(Path(scratch), options)
    settled = [row for row in seen if row["step"] >= options.settle]
    judged = judge(settled)
    recompiled = recompilations(options.layouts)
    judged |= {"layouts": options.layouts, "recompilations": recompiled}
    judged["holds"] = judged["holds"] and recompiled == 0
    where = {**provenance(), "device": device_name(torch.device("cpu"))}
    report = {**where, "command": " ".join(["python", *sys.argv]), **judged, "rows": seen}
    print(json.dumps(judged, indent=1))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if judged["holds"] else 1


def soak(folder: Path, options: argparse.Namespace) -> list[dict[str, int]]:
    """Train; what was seen."""
    (folder / "text").mkdir()
    write_text(folder / "text", BYTES, 200_000, 0)
    watch = Watch(folder / "run", max(options.steps // 200, 1))
    values = {
        "model": {"layers": 1, "dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 16,
                  "window": 8},
        "data": {"name": "text", "path": str(folder / "text"), "cache_dir": str(folder / "cache"),
                 "sequence_length": 64, "validation_tokens": 512, "workers": options.workers},
        "tokenizer": {"kind": "bytes"},
        "trainer": {"max_steps": options.steps, "validate_every_n_steps": max(options.steps // 20, 1),
                    "log_every_n_steps": 10, "progress_bar": "off", "device": "cpu"},
        "checkpoint": {"every_n_steps": 100},
        "evaluation": {"max_targets": 64, "context_lengths": [2, 16]},
        "logger": {"kind": "none"},
        "run_dir": str(folder / "run"),
    }  # fmt: skip
    trainer_type = run.pl.Trainer

    def watched(*arguments: Any, callbacks: list[pl.Callback], **given: Any) -> pl.Trainer:
        return trainer_type(*arguments, callbacks=[*callbacks, watch], **given)

    run.pl.Trainer = watched
    invocation = Invocation(output_dir=folder / "run", sweep_dir=None, command="soak")
    status = run.train(check_config(TrainConfig, values), invocation)
    run.pl.Trainer = trainer_type
    assert status == 0
    return watch.seen


def recompilations(layouts: int) -> int:
    """Graphs that are compiled for so many random layouts of documents, after those of the first."""
    torch.manual_seed(0)
    forget_compiled()
    model = Decoder(ModelConfig(**SHAPE, window=[16, None]), VOCABULARY)
    hidden = hidden_states(model, compiled=True)
    # Kernels are compiled for graphs, and those are counted.
    torch.compiler.set_stance("default", force_backend="aot_eager_decomp_partition")
    graphs = []
    for _ in range(layouts):
        begins_BT = torch.rand(SEQUENCES, TOKENS) < torch.rand(SEQUENCES, 1) ** 3
        begins_BT[:, 0] = True
        places_BT = torch.arange(TOKENS).expand(SEQUENCES, TOKENS)
        batch = {
            "tokens_BT": torch.randint(VOCABULARY, (SEQUENCES, TOKENS)),
            "documents_BT": begins_BT.cumsum(1).int() - 1,
            "positions_BT": places_BT - (places_BT * begins_BT).cummax(1).values,
        }
        visibilities = visibilities_on(model, batch, torch.device("cpu"))
        hidden(batch["tokens_BT"], visibilities=visibilities).square().sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    return graphs[-1] - graphs[0]


def judge(rows: list[dict[str, int]]) -> dict[str, Any]:
    """Whether what was seen holds the promises."""
    first, last = rows[0], rows[-1]
    growth = max(row["resident_bytes"] for row in rows) / first["resident_bytes"] - 1
    same = {
        name: sorted({row[name] for row in rows})
        for name in ("file_handles", "threads", "files", "bytes_beside_metrics")
    }
    return {
        "steps": last["step"],
        "resident_bytes_first": first["resident_bytes"],
        "resident_bytes_last": last["resident_bytes"],
        "largest_growth": growth,
        **same,
        "holds": growth <= MOST_GROWTH
        and len(same["file_handles"]) == 1
        and len(same["threads"]) == 1
        and same["files"][-1] - same["files"][0] <= 1
        and same["bytes_beside_metrics"][-1] <= 1.5 * same["bytes_beside_metrics"][0],
    }


if __name__ == "__main__":
    sys.exit(main())
