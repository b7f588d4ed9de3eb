"""Documents of a million tokens, scored by several processes and by one, as JSON.

`python -m tests.evaluation.million_tokens`

The longest windows hold all of a document; those of fewer tokens are dealt out.
"""

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from tests.conftest import SMALL_RUN, WORDS, start_script
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance

DOCUMENTS, TOKENS = 3, 1 << 20  # of a byte each
CONTEXT_LENGTHS = (1024, TOKENS // 2)
PROCESSES = (1, 2, 3)


def main() -> int:
    """Score and compare."""
    report: dict[str, Any] = {
        **provenance(),
        "device": device_name(torch.device("cpu")),
        "command": "python -m tests.evaluation.million_tokens",
        "documents": DOCUMENTS,
        "tokens_a_document": TOKENS,
        "context_lengths": CONTEXT_LENGTHS,
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = written(folder / "text")
        words = (*SMALL_RUN, f"data.path={text}", "trainer.max_steps=20", "trainer.device=cpu", "logger=none")
        told(folder, "train.py", *words, f"run_dir={folder / 'run'}")
        for count in PROCESSES:
            started = time.perf_counter()
            told(
                folder,
                "scripts/evaluate.py",
                f"checkpoint={folder / 'run'}",
                f"data.path={text}",
                f"evaluation.context_lengths=[{','.join(map(str, CONTEXT_LENGTHS))}]",
                "evaluation.streaming=false",
                "device=cpu",
                f"devices={count}",
                f"output_dir={folder / str(count)}",
            )
            row = compared(folder / "1", folder / str(count))
            report["rows"].append({"processes": count, "seconds": time.perf_counter() - started, **row})
    print(json.dumps(report, indent=1))
    return int(not all(row["equal"] for row in report["rows"]))


def written(folder: Path) -> Path:
    """Documents of drawn words."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(DOCUMENTS):
        text = " ".join(draw.choices(WORDS, k=TOKENS // 2))
        (folder / f"{number}.txt").write_bytes(text.encode("ascii", "replace")[:TOKENS])
    return folder


def told(folder: Path, script: str, *words: str) -> None:
    """Run a script of one thread a process, whose words stay out of the report."""
    done = start_script(script, *words, cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stderr


def compared(alone: Path, shared: Path) -> dict[str, Any]:
    """Sums of nats, to the last bit, and whether each target has those of one process."""
    wanted, found = (pq.read_table(folder / "losses.parquet") for folder in (alone, shared))
    nats = [name for name in found.column_names if "nats" in name]
    return {
        "targets": found.num_rows,
        "sums_of_nats": {name: pc.sum(found[name]).as_py().hex() for name in nats},
        "equal": found.equals(wanted)
        and (alone / "length.json").read_bytes() == (shared / "length.json").read_bytes(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
