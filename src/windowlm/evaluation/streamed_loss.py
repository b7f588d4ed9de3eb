"""Nats of targets in one pass with a rolling cache, for contexts that hold all that a model can see.

Where a context is at least the receptive field, a target's loss does not depend on it: windows of 2c tokens
would read each token twice at every such length, and one stream reads it once for all of them.

Shape letters: B documents in a batch, T tokens of a chunk, D model width, N scored tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from windowlm.evaluation.targets import TargetRegion, TokenReader
from windowlm.evaluation.token_loss import nats_of_targets
from windowlm.model.decoder import Decoder


def streams(model: nn.Module) -> bool:
    """Whether a pass from any token on gives what windows give.

    Not with attention sinks: the first tokens of a pass stay visible to all, so that its start matters.
    """
    return isinstance(model, Decoder) and not model.config.attention_sinks


def streamed_nats(
    model: Decoder,
    documents: TokenReader,
    regions: Sequence[TargetRegion],
    receptive_field: int,
    *,
    device: torch.device,
    batch_tokens: int,
    on_tokens: Callable[[int], Any] | None = None,
) -> npt.NDArray[np.float64]:
    """Nats of the targets, in the order of the regions.

    Each pass begins a receptive field before its first target. Short documents share a batch, filled up on
    the right, where no scored token looks; of a long one ``batch_tokens`` tokens are read at a time.

    Args:
        model: inside ``precision.scoring``; ``streams`` holds of it.
        documents: where the tokens are.
        regions: with at least a receptive field before each.
        receptive_field: tokens that can influence an output.
        device: of the model.
        batch_tokens: tokens of one forward pass.
        on_tokens: called after each chunk with the number of tokens that the model has read.
    """
    assert all(region.first >= receptive_field for region in regions)
    # The last target is not read.
    lengths = [region.end - 1 - (region.first - receptive_field) for region in regions]
    found: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(regions)
    order = sorted(range(len(regions)), key=lambda index: -lengths[index])
    begun = 0
    while begun < len(order):
        longest = lengths[order[begun]]
        rows = order[begun : begun + max(1, batch_tokens // longest)]
        begun += len(rows)
        tokens_BT = np.zeros((len(rows), longest + 1), dtype=np.int64)
        scored_BT = np.zeros((len(rows), longest), dtype=bool)
        for row, index in enumerate(rows):
            region = regions[index]
            tokens = documents.read(region.document, region.first - receptive_field, region.end)
            tokens_BT[row, : len(tokens)] = tokens
            scored_BT[row, receptive_field - 1 : len(tokens) - 1] = True
        cache = model.new_cache()
        pieces: list[list[npt.NDArray[np.float64]]] = [[] for _ in rows]
        chunk = max(1, batch_tokens // len(rows))
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            hidden_BTD = model.hidden(torch.from_numpy(tokens_BT[:, start:stop]).to(device), cache=cache)
            mask_BT = torch.from_numpy(scored_BT[:, start:stop])
            targets_N = torch.from_numpy(tokens_BT[:, start + 1 : stop + 1])[mask_BT].to(device)
            if len(targets_N):
                nats = nats_of_targets(model.head, hidden_BTD[mask_BT.to(device)], targets_N)
                ends = np.cumsum(scored_BT[:, start:stop].sum(axis=1))
                for row, piece in enumerate(np.split(nats, ends[:-1])):
                    pieces[row].append(piece)
            if on_tokens is not None:
                on_tokens(len(rows) * (stop - start))
        for row, index in enumerate(rows):
            found[index] = np.concatenate(pieces[row])
    return np.concatenate(found)
