"""Chooses token after token, and keeps what that depends on in tensors of fixed shape, for a replayed graph.

Shapes: B batch, T tokens, R tokens that the repetition penalty looks back, V vocabulary.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from windowlm.generation.config import SamplingConfig
from windowlm.generation.sampling import next_tokens

NO_TOKEN = -1


class Chosen(NamedTuple):
    """The next token of each row.

    Attributes:
        tokens: int64 [B].
        numbers: the tokens, and -log of the probability that the model gave to each, before temperature and
            filters; float64 [2, B], so that one copy takes both from the device.
    """

    tokens: Tensor
    numbers: Tensor


class Occurrences:
    """How often each token occurred in a row's text, or in its last few tokens.

    Args:
        earlier_BT: the text so far, `NO_TOKEN` for padding in front.
        vocabulary_size: V.
        window: R; None for the whole text.

    Attributes:
        counts: int32 [B, V].
    """

    def __init__(self, earlier_BT: Tensor, vocabulary_size: int, window: int | None) -> None:
        batch, device = len(earlier_BT), earlier_BT.device
        # What is no token falls into a column of its own.
        self._counts_BV = torch.zeros(batch, vocabulary_size + 1, dtype=torch.int32, device=device)
        self._last_BR: Tensor | None = None
        if window is not None:
            self._last_BR = torch.full((batch, window), NO_TOKEN, device=device)
            earlier_BT = earlier_BT[:, -window:]
            self._last_BR[:, window - earlier_BT.shape[1] :] = earlier_BT
        self._oldest_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self._add(earlier_BT, 1)

    @property
    def counts(self) -> Tensor:
        """Of every token."""
        return self._counts_BV[:, :-1]

    def add(self, tokens_B: Tensor) -> None:
        """Take in the next token of each row."""
        tokens_B1 = tokens_B[:, None]
        if self._last_BR is not None:
            self._add(self._last_BR.index_select(1, self._oldest_1), -1)
            self._last_BR.index_copy_(1, self._oldest_1, tokens_B1)
            self._oldest_1.copy_((self._oldest_1 + 1) % self._last_BR.shape[1])
        self._add(tokens_B1, 1)

    def _add(self, tokens_BT: Tensor, count: int) -> None:
        column_BT = tokens_BT.where(tokens_BT != NO_TOKEN, self._counts_BV.shape[1] - 1)
        self._counts_BV.scatter_add_(1, column_BT, torch.full_like(column_BT, count, dtype=torch.int32))

    def moving_state(self) -> Iterator[Tensor]:
        """What `add` changes."""
        yield self._counts_BV
        if self._last_BR is not None:
            yield self._last_BR
            yield self._oldest_1


def nats_of(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """-log of the probability of a token of each row, float64 [B].

    Powers are taken and summed in the dtype of the logits, as a GPU takes far longer in float64. What is as
    large as a logit is left to float64.
    """
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    total_B = (logits_BV - largest_B1).exp().sum(-1)
    chosen_B1 = logits_BV.gather(1, tokens_B[:, None])
    nats_B: Tensor = total_B.double().log() + (largest_B1.double() - chosen_B1.double())[:, 0]
    return nats_B


class TokenChoice:
    """Chooses by the settings, with the draws of each row one after the other.

    Args:
        settings: how.
        draws_BT: uniform numbers in [0, 1), at least as many as tokens will be chosen.
        earlier_BT: the tokens of the prompts, `NO_TOKEN` for padding in front.
        vocabulary_size: V.
        never_V: bool [V], tokens that are not chosen; None for none.
    """

    def __init__(
        self,
        settings: SamplingConfig,
        draws_BT: Tensor,
        earlier_BT: Tensor,
        vocabulary_size: int,
        never_V: Tensor | None = None,
    ) -> None:
        self.settings, self._never_V = settings, never_V
        self._draws_BT = draws_BT
        self._draw_1 = torch.zeros(1, dtype=torch.int64, device=draws_BT.device)
        self._occurrences: Occurrences | None = None
        if settings.repetition_penalty != 1:
            window, most = settings.repetition_window, earlier_BT.shape[1] + draws_BT.shape[1]
            self._occurrences = Occurrences(
                earlier_BT, vocabulary_size, window if window is not None and window < most else None
            )

    @torch.no_grad()
    def __call__(self, logits_BV: Tensor) -> Chosen:
        """Choose, and move on by a token."""
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        draws_B = self._draws_BT.index_select(1, self._draw_1)[:, 0]
        occurred_BV = None if self._occurrences is None else self._occurrences.counts > 0
        allowed_BV = logits_BV
        if self._never_V is not None:
            allowed_BV = logits_BV.masked_fill(self._never_V, -torch.inf)
        tokens_B = next_tokens(allowed_BV, draws_B, self.settings, occurred_BV)
        nats_B = nats_of(logits_BV, tokens_B)
        self._draw_1.add_(1)
        if self._occurrences is not None:
            self._occurrences.add(tokens_B)
        return Chosen(tokens_B, torch.stack([tokens_B.double(), nats_B]))

    def moving_state(self) -> Iterator[Tensor]:
        """What a call changes."""
        yield self._draw_1
        if self._occurrences is not None:
            yield from self._occurrences.moving_state()
