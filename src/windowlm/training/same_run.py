"""What two runs have that is not equal bit for bit: weights, state of training, metrics, evaluation."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from windowlm.evaluation.result_files import RESULT_NAME
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.lightning_module import STATE
from windowlm.training.metrics_log import WALL_CLOCK_COLUMNS, MetricsLog
from windowlm.training.run_folder import LAST, RunFolder

# Of the state of training: what neither the clock nor Lightning's own bookkeeping decides.
COMPARED = ("state_dict", "optimizer_states", "global_step", "MixedPrecision", "DocumentDataModule", STATE)
OF_THE_CLOCK = {"seconds_trained"}


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs, a line each; nothing where all is equal bit for bit.

    Args:
        one: folder of a run.
        other: folder of a run.
    """
    first, second = RunFolder(one), RunFolder(other)
    found = list(_of_rows(deterministic_rows(first.metrics), deterministic_rows(second.metrics)))
    states = [AtomicCheckpointIO().load_checkpoint(folder.checkpoints / LAST) for folder in (first, second)]
    for name in COMPARED:
        found += _of_values(name, states[0].get(name), states[1].get(name))
    weights = [load_file(folder.model / "model.safetensors") for folder in (first, second)]
    found += _of_values("model", *weights)
    results = [folder.evaluation / RESULT_NAME for folder in (first, second)]
    if results[0].read_bytes() != results[1].read_bytes():
        found.append(f"evaluation/{RESULT_NAME} differs")
    return found


def deterministic_rows(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, without what the clock and the machine decide."""
    rows = MetricsLog(metrics).rows()
    return [{name: row[name] for name in row if name not in WALL_CLOCK_COLUMNS} for row in rows]


def _of_rows(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> Iterator[str]:
    for number, (first, second) in enumerate(zip_longest(one, other), start=1):
        if first != second:
            yield f"metrics.jsonl, row {number}: {first} and {second}"


def _of_values(place: str, one: Any, other: Any) -> Iterator[str]:
    if type(one) is not type(other):
        yield f"{place}: {type(one).__name__} and {type(other).__name__}"
    elif isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            yield f"{place}: {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"
        elif not torch.equal(_bits(one), _bits(other)):
            largest = (one.double() - other.double()).abs().max().item()
            yield f"{place}: largest difference {largest:g}"
    elif isinstance(one, dict):
        for name in [*one, *(name for name in other if name not in one)]:
            if name not in OF_THE_CLOCK:
                yield from _of_values(f"{place}.{name}", one.get(name), other.get(name))
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{place}: {len(one)} and {len(other)} entries"
        for number, (first, second) in enumerate(zip(one, other, strict=False)):
            yield from _of_values(f"{place}.{number}", first, second)
    elif one != other:
        yield f"{place}: {one} and {other}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, which tell -0.0 from 0.0 and one NaN from another."""
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor
