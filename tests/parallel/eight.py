"""Bytes that eight processes send for one layer, beside the formula of docs/scaling.md, as a line of JSON.

`python -m tests.parallel.eight`
"""

import json
from typing import Any

import torch
import torch.distributed as dist

from tests.parallel.processes import run_in_processes
from windowlm.attention.dispatch import attention
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.sequence_shard import shard_visibilities
from windowlm.training.provenance import provenance

PROCESSES, TOKENS, KV_HEADS, HEAD_DIM = 8, 4096, 2, 16
WINDOWS = (64, 512, 513, 514, 1025, 4096, None)


def halo_bytes(window: int | None, tokens: int, processes: int, each: int) -> int:
    """Bytes of keys and values that all processes together send forward for one row and layer."""
    part = tokens // processes
    reach = tokens if window is None else window - 1
    return each * sum(min(reach, rank * part) for rank in range(processes))


def gathered_bytes(tokens: int, processes: int, each: int) -> int:
    """The same where each process gets all keys and values."""
    return each * tokens * (processes - 1)


def count(rank: int) -> dict[str, tuple[int, int]]:
    """Bytes sent forward and back for each window."""
    group = ContextGroup(dist.group.WORLD)
    sent = {}
    for window in WINDOWS:
        (shard,) = shard_visibilities({window: 0}, group, 1, TOKENS).values()
        length = TOKENS // group.size
        query, key, value = (torch.randn(1, length, KV_HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
        group.bytes_sent = 0
        output = shard.attend(attention, query, key, value)
        forward = group.bytes_sent
        output.sum().backward()  # type: ignore[no-untyped-call]
        sent[str(window)] = forward, group.bytes_sent - forward
    return sent


def main() -> int:
    """Count and compare."""
    counted = run_in_processes(PROCESSES, count)
    each = 2 * KV_HEADS * HEAD_DIM * 4
    rows: list[dict[str, Any]] = []
    for window in WINDOWS:
        forward, back = (sum(of_one[str(window)][way] for of_one in counted) for way in (0, 1))
        rows.append(
            {
                "window": window,
                "forward_bytes": forward,
                "backward_bytes": back,
                "formula": halo_bytes(window, TOKENS, PROCESSES, each),
                "gathering_all": gathered_bytes(TOKENS, PROCESSES, each),
            }
        )
    settings = {"processes": PROCESSES, "tokens": TOKENS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    report = {**provenance(), "command": "python -m tests.parallel.eight", **settings, "rows": rows}
    print(json.dumps(report))
    return int(any(row["formula"] != row["forward_bytes"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
