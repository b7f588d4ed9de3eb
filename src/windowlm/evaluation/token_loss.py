"""Nats of every target token.

Shape letters: B windows in a batch, T tokens of a window, D model width, N scored tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from windowlm.errors import UserError
from windowlm.evaluation.targets import ScoredWindow, TokenReader

# Logits in memory at once, by type of device: on a CPU they should stay in its cache, which halves the
# time; a GPU wants large pieces (256 MiB in float32).
LOGITS_AT_ONCE = {"cpu": 1 << 20}
LOGITS_AT_ONCE_ELSEWHERE = 1 << 26


class LanguageModel(Protocol):
    """A causal model in two parts, so that the head is applied to scored positions only."""

    def hidden(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Final states ``[B, T, D]``; each row is one document."""
        ...

    @property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Map ``[..., D]`` to the logits of the next token, ``[..., V]``."""
        ...


def target_nats(
    model: LanguageModel,
    documents: TokenReader,
    windows: Sequence[ScoredWindow],
    *,
    device: torch.device,
    batch_tokens: int,
    on_tokens: Callable[[int], Any] | None = None,
) -> npt.NDArray[np.float64]:
    """Nats of the scored tokens, in the order of the windows.

    Windows of one batch are filled up to the longest on the right, where a causal model lets no scored
    token look; longest windows go first, so that nearly all batches have one shape.

    Args:
        model: model inside ``precision.scoring``.
        documents: where the windows' tokens are.
        windows: all with the same number of tokens before the first scored one.
        device: device of the model.
        batch_tokens: tokens of one forward pass.
        on_tokens: called after each batch with the number of tokens that the model has read.
    """
    contexts = {window.first - window.start for window in windows}
    assert len(contexts) == 1, f"windows of one call differ in context: {sorted(contexts)}"
    (context,) = contexts
    ends = np.cumsum([window.end - window.first for window in windows])
    nats = np.empty(ends[-1], dtype=np.float64)
    order = sorted(range(len(windows)), key=lambda index: windows[index].start - windows[index].end)
    start = 0
    while start < len(order):
        # The last token of a window is a target only, so the model reads one token less.
        length = windows[order[start]].end - windows[order[start]].start - 1
        rows = order[start : start + max(1, batch_tokens // length)]
        start += len(rows)
        tokens_BT = np.zeros((len(rows), length + 1), dtype=np.int64)
        scored_BT = np.zeros((len(rows), length + 1 - context), dtype=bool)
        for row, index in enumerate(rows):
            window = windows[index]
            tokens = documents.read(window.document, window.start, window.end)
            tokens_BT[row, : len(tokens)] = tokens
            scored_BT[row, : window.end - window.first] = True
        batch_BT = torch.from_numpy(tokens_BT).to(device)
        mask_BT = torch.from_numpy(scored_BT).to(device)
        hidden_ND = model.hidden(batch_BT[:, :-1])[:, context - 1 :][mask_BT]
        batch_nats = nats_of_targets(model.head, hidden_ND, batch_BT[:, context:][mask_BT])
        position = 0
        for index in rows:
            count = windows[index].end - windows[index].first
            nats[ends[index] - count : ends[index]] = batch_nats[position : position + count]
            position += count
        if on_tokens is not None:
            on_tokens(len(rows) * length)
    return nats


def nats_of_targets(
    head: Callable[[torch.Tensor], torch.Tensor], hidden_ND: torch.Tensor, targets_N: torch.Tensor
) -> npt.NDArray[np.float64]:
    """``-log softmax(head(hidden))[target]`` of each row, the head applied to a piece at a time.

    Exponentials are taken in float32 (float64 where the logits are) and their logarithm in float64, so
    that equal logits give exactly ``log V``.

    Raises:
        UserError: a loss is infinite or NaN.
    """
    nats = np.empty(len(targets_N), dtype=np.float64)
    logits_at_once = LOGITS_AT_ONCE.get(hidden_ND.device.type, LOGITS_AT_ONCE_ELSEWHERE)
    rows = max(1, logits_at_once // head(hidden_ND[:1]).shape[-1])
    for start in range(0, len(targets_N), rows):
        piece = slice(start, start + rows)
        logits_NV = head(hidden_ND[piece])
        if logits_NV.dtype is not torch.float64:
            logits_NV = logits_NV.float()
        largest_N1 = logits_NV.amax(dim=-1, keepdim=True)
        sums_N = (logits_NV - largest_N1).exp().sum(dim=-1)
        gaps_N = (largest_N1 - logits_NV.gather(-1, targets_N[piece, None])).squeeze(-1)
        nats[piece] = gaps_N.cpu().double().numpy() + np.log(sums_N.cpu().double().numpy())
    if not np.isfinite(nats).all():
        raise UserError(
            "the model's loss is not finite: its weights hold infinities or NaN, or overflow at this "
            "precision; try evaluation.precision=32-true, where it is another"
        )
    return nats
