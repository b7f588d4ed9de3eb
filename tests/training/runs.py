"""Runs of six steps in this process, and what they leave."""

import io
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from windowlm.command_line import Invocation
from windowlm.config import TrainConfig, check_config
from windowlm.evaluation import evaluate
from windowlm.training import closing_screen
from windowlm.training.metrics_log import WALL_CLOCK_COLUMNS, MetricsLog
from windowlm.training.run import train

SHAPE = {
    "layers": 1,
    "dim": 16,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "feed_forward_dim": 16,
    "window": 8,
}


def begin(folder: Path, texts: Path, cache_dir: Path, sweep: bool = False, **changes: Any) -> int:
    """Start a run of six steps in a folder, or go on with it, as ``train.py`` would.

    Its plot and its page are blank, and nothing is compressed, as these take longer than the run.
    """
    invocation = Invocation(
        output_dir=folder,
        sweep_dir=folder.parent if sweep else None,
        command=changes.pop("command", f"python train.py {shlex.quote(f'run_dir={folder}')}"),
    )
    values = {
        "model": {**SHAPE, "attention_dropout": 0.2, **changes.pop("model", {})},
        "data": {
            "name": "text",
            "path": str(texts),
            "cache_dir": str(cache_dir),
            "sequence_length": 64,
            "batch_size": 2,
            "validation_tokens": 256,
            **changes.pop("data", {}),
        },
        "tokenizer": {"kind": "bytes"},
        "trainer": {
            "max_steps": 6,
            "validate_every_n_steps": 2,
            "log_every_n_steps": 3,
            "progress_bar": "off",
            **changes.pop("trainer", {}),
        },
        "evaluation": {"max_targets": 64, "context_lengths": [2, 16]},
        "logger": {"kind": "none"},
        "resume": "auto",
        "run_dir": str(folder),
        **changes,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "length_plot", lambda _: blank_png())
        patch.setattr(evaluate, "length_sections", lambda *_: [])
        patch.setattr(evaluate, "html_page", lambda *_: b"")
        patch.setattr(closing_screen, "compressed_bits_per_byte", lambda _: {"gzip": 1.0, "xz": 1.0})
        return train(check_config(TrainConfig, values), invocation)


@cache
def blank_png() -> bytes:
    content = io.BytesIO()
    Image.new("1", (1, 1)).save(content, "PNG")
    return content.getvalue()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: row[name] for name in row if name not in WALL_CLOCK_COLUMNS}
        for row in MetricsLog(folder / "metrics.jsonl").rows()
    ]


def record(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return loaded


def steps_saved(folder: Path) -> int:
    step: int = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    return step
