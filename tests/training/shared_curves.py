"""Losses of 50 steps by two processes in each way of sharing beside those of one, as JSON.

`python -m tests.training.shared_curves`
"""

import json
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from tests.conftest import write_documents
from tests.parallel.processes import run_in_processes
from tests.training.runs import begin, rows
from tests.training.test_shared_work import CHECKPOINTED, COMPILED, KINDS, MOST, one_like, settings_of
from windowlm.parallel.launcher import LAUNCHED
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance

STEPS = 50
COLUMNS = ("train_loss", "validation_loss", "gradient_norm")


def of_steps(name: str) -> dict[str, Any]:
    """Settings of a run, each of whose steps is logged."""
    made = settings_of(name)
    made["trainer"] |= {"max_steps": STEPS, "log_every_n_steps": 1}
    return made


def run(rank: int, base: Path, texts: Path, names: tuple[str, ...]) -> list[int]:
    """The runs of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", LAUNCHED: "1"}
    with (
        redirect_stdout(sys.stderr),
        torch.compiler.set_stance("default", force_backend="aot_eager_decomp_partition"),
    ):
        return [begin(base / name, texts, base / "cache", **of_steps(name)) for name in names]


def main() -> int:
    """Train and compare."""
    started = time.perf_counter()
    # As each of the two has: with another number the sums of a product are taken in another order.
    torch.set_num_threads(1)
    names = (*KINDS, *COMPILED, *CHECKPOINTED)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        texts = write_documents(base / "texts")
        with redirect_stdout(sys.stderr):
            for name in sorted(set(map(one_like, names))):
                assert begin(base / name, texts, base / "cache", **of_steps(name)) == 0
        statuses = run_in_processes(2, run, base, texts, names)
        assert statuses == [[0] * len(names)] * 2
        largest: dict[str, dict[str, float]] = {}
        for name in names:
            alone, shared = rows(base / one_like(name)), rows(base / name)
            assert [row["step"] for row in shared] == [row["step"] for row in alone]
            largest[name] = {
                column: max(
                    abs(found[column] - wanted[column])
                    for wanted, found in zip(alone, shared, strict=True)
                    if column in wanted
                )
                for column in COLUMNS
            }
        alone = rows(base / "one")
    report = {
        **provenance(),
        "device": device_name(torch.device("cpu")),
        "command": "python -m tests.training.shared_curves",
        "allowed": MOST,
        "steps": STEPS,
        "processes": 2,
        "first_loss": alone[0]["train_loss"],
        "last_loss": [row["train_loss"] for row in alone if "train_loss" in row][-1],
        "largest_difference": largest,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(report, indent=1))
    return int(max(max(of_one.values()) for of_one in largest.values()) > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
