"""Read what W&B wrote while offline, and compare its history with a run's metrics.

The files are protocol buffers in LevelDB's log format, after seven bytes of W&B's own:
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from windowlm.evaluation.result_files import OWN_EVALUATION
from windowlm.training.metrics_log import MetricsLog
from windowlm.training.run_folder import RunFolder
from windowlm.training.wandb_run import parse_record

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of the log, those cut over blocks put together.

    Raises:
        ValueError: the log is damaged or ends in a record.
    """
    if data[:4] != b":W&B":
        raise ValueError("it does not begin as a file of W&B")
    at, parts = HEADER, b""
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = (
            int.from_bytes(data[at + start : at + end], "little") for start, end in ((0, 4), (4, 6), (6, 7))
        )
        # The kind is covered as well.
        if checksum != zlib.crc32(data[at + HEADER - 1 : at + HEADER + length]):
            raise ValueError(f"it is damaged or cut off at byte {at:,}")
        if kind in (FULL, FIRST):
            parts = b""
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield parts


def read_offline_run(folder: Path) -> dict[str, Any]:
    """Id, group, configuration, history, file names and exit code of one ``offline-run-*`` folder.

    Raises:
        ValueError: there is no file, or it is damaged or cut off within a record.
        OSError: it cannot be read.
    """
    read: dict[str, Any] = {
        "id": None,
        "group": None,
        "config": {},
        "history": [],
        "files": [],
        "exit_code": None,
    }
    path = next(folder.glob("run-*.wandb"), None)
    if path is None:
        raise ValueError("there is no file in it")
    for data in log_records(path.read_bytes()):
        record = parse_record(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            read["id"], read["group"] = record.run.run_id, record.run.run_group
            read["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            read["config"] |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.config.update
            }
        elif kind == "history":
            read["history"].append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
            )
        elif kind == "exit":
            read["exit_code"] = record.exit.exit_code
        elif kind == "files":
            read["files"] += [file.path for file in record.files.files]
    return read


def history_by_step(read: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """What the history holds of the metrics at each step: one entry, unless a step was logged twice."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in read["history"]:
        # W&B knows NaN and infinity, the metrics do not.
        own = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
            if not name.startswith(("_", OWN_EVALUATION))
        }
        if own:  # evaluations have steps of their own behind the last
            by_step.setdefault(row["_step"], []).append(own)
    return by_step


def metrics_by_step(metrics: Path) -> dict[int, dict[str, Any]]:
    """The rows of ``metrics.jsonl``, those of the same step as one."""
    merged: dict[int, dict[str, Any]] = {}
    for row in MetricsLog(metrics).rows():
        merged.setdefault(row.pop("step"), {}).update(row)
    return merged


def history_differences(run: Path, evaluated: bool = True) -> list[str]:
    """How what W&B holds of a run that has left differs from its ``metrics.jsonl``; empty where it does not.

    Args:
        run: folder of the run. It must hold one offline run, of the recorded id, with each step once and its
            end.
        evaluated: whether the run has finished, so that W&B must hold an evaluation.
    """
    folders = sorted(run.glob("wandb/offline-run-*"))
    if len(folders) != 1:
        return [f"{len(folders)} W&B runs instead of one: {[path.name for path in folders]}"]
    try:
        read = read_offline_run(folders[0])
    except (OSError, ValueError) as error:
        return [f"{folders[0].name}: {error}"]
    recorded = RunFolder(run).read_record()["wandb_id"]
    found = [] if read["id"] == recorded else [f"the W&B run is {read['id']} and not {recorded}"]
    history, metrics = history_by_step(read), metrics_by_step(run / "metrics.jsonl")
    for step in sorted(history.keys() | metrics.keys()):
        if history.get(step) != [metrics.get(step)]:
            found.append(f"W&B, step {step}: {history.get(step)} and not {metrics.get(step)} once")
    if evaluated and not any(name.startswith(OWN_EVALUATION) for row in read["history"] for name in row):
        found.append("W&B has no evaluation")
    if read["exit_code"] != 0:
        found.append(f"the W&B run ended with {read['exit_code']} and not 0")
    return found
