"""Take a step again whose loss or gradient was not finite, and say where the numbers went wrong.

python scripts/replay_batch.py RUN_DIR/replay/step_12.ckpt
python scripts/replay_batch.py RUN_DIR/replay/step_12.ckpt --precision 64-true

The file holds the weights before the step and its batches; settings come from the run's config.json. Windows
are those of the step's stage of the window warm-up, and dropout draws what it drew then. Where the device had
taken steps on before the run heard of it, which a GPU may when trainer.max_skipped_steps allows it, the
weights are of so many steps later, which is said.
"""

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from windowlm.bundle import device_named
from windowlm.config import TrainConfig, check_config
from windowlm.data.packing import UNSCORED
from windowlm.errors import UserError, exit_status
from windowlm.evaluation.precision import AUTOCAST_DTYPES, WEIGHT_DTYPES
from windowlm.json_text import parse_json
from windowlm.model.decoder import Decoder
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.device_batch import shown_to_layers, visibilities_on
from windowlm.training.lightning_module import dropout_seed, further_of
from windowlm.training.linear_cross_entropy import head_loss
from windowlm.training.non_finite import REPLAY_FORMAT

MOST_SHOWN = 10
# Of a replay, as `windowlm.training.non_finite` writes it.
KEYS: dict[str, type | UnionType] = {
    "step": int,
    "later_steps": int,
    "first_batch": int,
    "learning_rate": float,
    "window_limit": int | None,
    "seed": int,
    "batches": list,
    "vocabulary_size": int,
    "model": dict,
}
BATCH_KEYS = {"tokens_BT", "targets_BT", "documents_BT", "positions_BT"}


def main() -> int:
    """Replay what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("replay", type=Path, help="file in the folder replay of a run")
    parser.add_argument("--precision", choices=sorted(WEIGHT_DTYPES), help="default: the run's")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = device_named(options.device)
    content = AtomicCheckpointIO().load_checkpoint(options.replay)
    foreign = f"{options.replay}: is no replay of this version; give a file that it saved in RUN_DIR/replay"
    if not isinstance(content, dict) or content.get("format") != REPLAY_FORMAT:
        raise UserError(foreign)
    if wrong := [name for name, kind in KEYS.items() if not isinstance(content.get(name, ...), kind)]:
        raise UserError(f"{foreign} (its {wrong[0]} is missing or of another kind)")
    if (limit := content["window_limit"]) is not None and limit < 1:
        raise UserError(f"{foreign} (its window_limit is {limit}; none or a number from 1 on is allowed)")
    if (size := content["vocabulary_size"]) < 1 or not content["batches"]:
        raise UserError(f"{foreign} (its vocabulary_size is {size}, its batches {len(content['batches'])})")
    for batch in content["batches"]:
        if (wrong := what_is_wrong(batch, size)) is not None:
            raise UserError(f"{foreign} ({wrong})")
    config = read_config(options.replay.parent.parent / "config.json")
    precision = options.precision or config.precision
    model = Decoder(config.model, content["vocabulary_size"])
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{foreign}, beside the config.json of its run: {reason}") from None
    try:
        lines = replay(model, content, config, precision, device)
    except ValueError as error:  # of documents and positions that are none
        raise UserError(f"{foreign}: {error}") from None
    print("\n".join(lines))
    return 0


def what_is_wrong(batch: Any, vocabulary_size: int) -> str | None:
    """Why a batch cannot be replayed; None where it can."""
    if not isinstance(batch, dict) or not batch.keys() >= BATCH_KEYS:
        return f"a batch lacks one of {', '.join(sorted(BATCH_KEYS))}"
    shapes = set()
    for name in sorted(BATCH_KEYS):
        tensor = batch[name]
        whole = isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.int32, torch.int64)
        if not whole or tensor.dim() != 2 or tensor.layout != torch.strided or tensor.is_meta:
            return f"the {name} of a batch are no whole numbers of rows and tokens"
        shapes.add(tensor.shape)
    if len(shapes) > 1 or not batch["tokens_BT"].numel():
        return f"the tensors of a batch have the shapes {sorted(map(tuple, shapes))}"
    tokens, targets = batch["tokens_BT"], batch["targets_BT"][batch["targets_BT"] != UNSCORED]
    if any(bool(((ids < 0) | (ids >= vocabulary_size)).any()) for ids in (tokens, targets)):
        return f"a token of a batch is none of the {vocabulary_size:,}"
    return None


def read_config(path: Path) -> TrainConfig:
    """The settings of the run.

    Raises:
        UserError: they cannot be read.
    """
    try:
        return check_config(TrainConfig, parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}; keep the file in its run's folder") from None


def replay(
    model: Decoder, content: dict[str, Any], config: TrainConfig, precision: str, device: torch.device
) -> list[str]:
    """What happened in the step, as lines for the screen."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(WEIGHT_DTYPES[precision])
    model = model.to(device).train()
    lines = [f"step {content['step']}, {precision}, {device}, learning rate {content['learning_rate']:g}"]
    if content["later_steps"]:
        lines.append(f"the weights are of {content['later_steps']} steps later")
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    lines.append(f"weights       {named(wrong) or 'finite'}")
    first = first_not_finite(model)
    dtype = AUTOCAST_DTYPES.get(precision)
    loss_of = head_loss(config.trainer.loss, config.precision, compiled=False)
    for number, batch in enumerate(content["batches"], start=content["first_batch"]):
        torch.manual_seed(dropout_seed(content["seed"], number))
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        targets_N = moved["targets_BT"].flatten()
        shown = shown_to_layers(batch, config.data.document_masking)
        visibilities = visibilities_on(model, shown, device, content["window_limit"])
        with torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext():
            hidden_BTD = model.hidden(moved["tokens_BT"], visibilities=visibilities)
            loss = partial(
                loss_of,
                hidden_BTD.flatten(0, 1),
                model.head.weight,
                unscored=UNSCORED,
                logit_cap=model.head.logit_cap,
            )
            summed, nats_N = loss(targets_N)
            for further_BT, weight in further_of(moved):
                summed = summed + weight * loss(further_BT.flatten())[0]
        summed.backward()
        targets = int((targets_N != UNSCORED).sum())
        bad = int((~nats_N.isfinite()).sum())
        lines.append(
            f"batch {number:<7} loss {float(summed.detach()) / max(targets, 1):.6g}, "
            f"{bad:,} of {targets:,} targets not finite"
        )
    lines.append(f"first output  {first[0] if first else 'all finite'}")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wrong = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    lines.append(f"gradients     {named(wrong) or 'finite'}")
    largest = sorted(gradients, key=lambda name: -float(gradients[name].abs().nan_to_num(torch.inf).max()))
    for name in largest[:MOST_SHOWN]:
        lines.append(f"  largest {float(gradients[name].abs().max()):<12.6g} {name}")
    return lines


def first_not_finite(model: torch.nn.Module) -> list[str]:
    """A list that will hold the name of the first part of the model whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> None:
        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and not found and not bool(output.isfinite().all()):
                found.append(f"{name} is the first that is not finite")

        model.get_submodule(name).register_forward_hook(look)

    for name, _ in model.named_modules():
        if name:
            watch(name)
    return found


def named(names: list[str]) -> str:
    """Names in short."""
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return f"not finite: {', '.join(names[:MOST_SHOWN])}{more}" if names else ""


if __name__ == "__main__":
    sys.exit(exit_status(main))
