"""Reads what W&B wrote while offline: protocol buffers in LevelDB's log format.

https://github.com/google/leveldb/blob/main/doc/log_format.md, after seven bytes of W&B's own.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

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
