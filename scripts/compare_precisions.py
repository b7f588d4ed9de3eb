"""Train the same steps at each precision: how far its losses end from float32's, and what is refused here.

python scripts/compare_precisions.py --out docs/results/precisions_cpu.json
python scripts/compare_precisions.py --steps 500 model=small data.path=FOLDER

Settings of train.py may follow. Each run is one of train.py with the same seed, so the same weights, text and
order. `train_loss` is the mean over the last tenth of the steps, `validation_loss` that of the end, both in
nats a token; the `over_float32` beside them are their shares beyond those of 32-true.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch
from benchmark_attention import circumstances
from out_argument import out_file
from rich.console import Console
from rich.table import Table

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.errors import exit_status
from windowlm.training.config import Precision

TRAIN = Path(__file__).parents[1] / "train.py"
EXACT = "32-true"
LOSSES = ("train_loss", "validation_loss")
REFUSED = 2  # status of a user's mistake


def main() -> int:
    """Run the command; the status is that of a run which failed and was not refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=out_file, metavar="FILE")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of train.py")
    options = parser.parse_args()
    if options.steps < 10:
        parser.error(f"--steps {options.steps}: a number from 10 on is allowed; try --steps 500")
    if wrong := next((word for word in options.settings if "=" not in word), None):
        parser.error(f"{wrong}: settings of train.py are key=value")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = {**circumstances(device, ("torch", "windowlm")), "steps": options.steps, "rows": []}
    others = [name for name in get_args(Precision) if name != EXACT]
    with tempfile.TemporaryDirectory() as folder:
        for precision in (EXACT, *others):
            row = trained(precision, options, Path(folder, precision))
            if "status" in row:
                print(f"{precision}: {row['problem']}", file=sys.stderr)
                return int(row["status"])
            report["rows"].append(row)
    exact = report["rows"][0]
    for row in report["rows"]:
        for name in LOSSES:
            row[f"{name}_over_float32"] = row[name] / exact[name] - 1 if name in row else None
    Console().print(table_of(report["rows"]))
    if options.out is not None:
        write_atomically(options.out, json_bytes(report))
    return 0


def trained(precision: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Losses of one run, or why it was refused; a `status` where it failed."""
    logged = max(options.steps // 50, 1)
    words = [
        *("logger=none", f"trainer.max_steps={options.steps}", f"trainer.log_every_n_steps={logged}"),
        *("evaluation.max_targets=64", "checkpoint.keep=false", *options.settings),
        *(f"precision={precision}", f"run_dir={folder}"),
    ]
    done = subprocess.run([sys.executable, str(TRAIN), *words], capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"precision": precision, "settings": options.settings}
    said = done.stderr.strip().splitlines() or [""]
    problem = next((line.removeprefix("error: ") for line in said if line.startswith("error: ")), said[-1])
    if done.returncode == REFUSED and precision != EXACT:
        return row | {"refused": problem}
    if done.returncode:
        return row | {"status": done.returncode, "problem": problem}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [each["train_loss"] for each in rows if each.get("train_loss") is not None]
    last = losses[-max(len(losses) // 10, 1) :]
    validations = [each["validation_loss"] for each in rows if "validation_loss" in each]
    return row | {"train_loss": sum(last) / len(last), "validation_loss": validations[-1]}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """For the terminal."""
    table = Table()
    for column in ("precision", "train loss", "over float32", "validation loss", "over float32", "refused"):
        table.add_column(column, justify="left" if column in ("precision", "refused") else "right")
    for row in rows:
        cells = [
            cell
            for name in LOSSES
            for cell in (
                (f"{row[name]:.4f}", f"{row[f'{name}_over_float32']:+.2%}") if name in row else ("", "")
            )
        ]
        table.add_row(row["precision"], *cells, row.get("refused", ""))
    return table


if __name__ == "__main__":
    sys.exit(exit_status(main))
