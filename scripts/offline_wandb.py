"""Read what W&B wrote while offline, and compare its history with a run's metrics.

The files are protocol buffers in LevelDB's log format, after seven bytes of W&B's own:
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of the log, those cut over blocks put together."""
    assert data[:4] == b":W&B"
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def read_offline_run(folder: Path) -> dict[str, Any]:
    """Id, group, configuration, history, file names and exit code of one ``offline-run-*`` folder."""
    from wandb.proto import wandb_internal_pb2  # runs without W&B are compared where it is not installed

    read: dict[str, Any] = {
        "id": None,
        "group": None,
        "config": {},
        "history": [],
        "files": [],
        "exit_code": None,
    }
    for data in log_records(next(folder.glob("run-*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
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
        own = {name: row[name] for name in row if not name.startswith(("_", "evaluation/"))}
        if own:  # evaluations have steps of their own behind the last
            by_step.setdefault(row["_step"], []).append(own)
    return by_step


def metrics_by_step(metrics: Path) -> dict[int, dict[str, Any]]:
    """The rows of ``metrics.jsonl``, those of the same step as one."""
    merged: dict[int, dict[str, Any]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        merged.setdefault(row.pop("step"), {}).update(row)
    return merged


def history_differences(run: Path) -> list[str]:
    """How what W&B holds of a finished run differs from its ``metrics.jsonl``; nothing where it does not.

    Args:
        run: folder of the run. It must hold one offline run, of the recorded id, with each step once.
    """
    folders = sorted(path.name for path in run.glob("wandb/offline-run-*"))
    if len(folders) != 1:
        return [f"{len(folders)} W&B runs instead of one: {folders}"]
    read = read_offline_run(run / "wandb" / folders[0])
    recorded = json.loads((run / "run.json").read_text(encoding="utf-8"))["wandb_id"]
    found = [] if read["id"] == recorded else [f"the W&B run is {read['id']} and not {recorded}"]
    history, metrics = history_by_step(read), metrics_by_step(run / "metrics.jsonl")
    for step in sorted(history.keys() | metrics.keys()):
        if history.get(step) != [metrics.get(step)]:
            found.append(f"W&B, step {step}: {history.get(step)} and not {metrics.get(step)} once")
    if read["exit_code"] != 0:
        found.append(f"the W&B run ended with {read['exit_code']} and not 0")
    return found
