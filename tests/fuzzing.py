"""Draw thousands of settings, words and files by the tests of fuzzing, and write what was drawn as JSON.

python -m tests.fuzzing --cases 3000 --out docs/results/reliability_cpu
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis.statistics import collector

from tests import test_fuzzing
from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.training.peak_flops import device_name
from windowlm.training.provenance import provenance

KINDS: tuple[Callable[[], None], ...] = (
    test_fuzzing.test_a_drawn_value_is_taken_or_refused,
    test_fuzzing.test_a_drawn_word_is_taken_or_refused,
    test_fuzzing.test_a_drawn_file_is_read_or_refused_by_name,
    test_fuzzing.test_drawn_metrics_are_read_or_refused_by_name,
)


def main() -> int:
    """Draw and write; 1 where a case ended otherwise than it may, or too few were drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="of each kind")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write fuzzing.json")
    options = parser.parse_args()
    seed = random.SystemRandom().getrandbits(32)
    rows = [drawn(kind, options.cases, seed) for kind in KINDS]
    report = {
        **provenance(),
        "device": device_name(torch.device("cpu")),
        "command": " ".join(["python -m tests.fuzzing", *sys.argv[1:]]),
        "hypothesis": hypothesis.__version__,
        "seed": seed,
        "cases": sum(row["cases"] for row in rows),
        "failed": sum(row["failed"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "rows": rows,
    }
    if options.out is not None:
        write_atomically(options.out / "fuzzing.json", json_bytes(report))
    # A kind may end before it has drawn.
    whole = all(row["cases"] >= options.cases and row["error"] is None for row in rows)
    return int(report["failed"] > 0 or not whole)


def drawn(kind: Callable[[], None], count: int, seed: int) -> dict[str, Any]:
    """What came of so many cases of one kind."""
    started = time.monotonic()
    seen: list[dict[str, Any]] = []
    tried = hypothesis.settings(max_examples=count, deadline=None, database=None)(kind)
    error = None
    with collector.with_value(seen.append):  # type: ignore[no-untyped-call]
        try:
            hypothesis.seed(seed)(tried)()
        except Exception as found:
            error = repr(found)
    endings = Counter(
        case["status"]
        for phases in seen
        for phase in phases.values()
        if isinstance(phase, dict)
        for case in phase["test-cases"]
    )
    row = {
        "kind": kind.__name__.removeprefix("test_"),
        "cases": endings["valid"] + endings["interesting"],
        "failed": endings["interesting"],
        "error": error,
        "seconds": round(time.monotonic() - started, 1),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
