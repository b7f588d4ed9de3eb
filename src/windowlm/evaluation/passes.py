"""The passes over the text that an evaluation is made of, cut into parts that can be kept one by one.

Shape letters: N targets of a part.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from windowlm.evaluation.streamed_loss import streamed_nats, streams
from windowlm.evaluation.targets import (
    ScoredWindow,
    TargetRegion,
    TargetSet,
    TokenReader,
    naive_windows,
    protocol_windows,
)
from windowlm.evaluation.token_loss import target_nats

# A part ends behind so many tokens, or behind those of a batch if they are more. Where parts end decides
# which windows share a batch, so it does not depend on what is scored already: an evaluation that was
# interrupted has the same bits as one that was not.
PART_TOKENS = 1 << 16
Kind = Literal["protocol", "naive"]


class Score(Protocol):
    """Scores one part."""

    def __call__(
        self, model: Any, *, device: torch.device, on_tokens: Callable[[int], Any]
    ) -> npt.NDArray[np.float64]:
        """Nats ``[N]``; ``on_tokens`` is told how many tokens the model has read."""
        ...


@dataclass(frozen=True)
class Part:
    """Consecutive targets.

    Attributes:
        targets: how many.
        tokens: that the model reads for them.
        score: makes their nats.
    """

    targets: int
    tokens: int
    score: Score


@dataclass(frozen=True)
class Pass:
    """Parts that together score every target once, in order.

    Attributes:
        name: tells it from others of the same targets.
        kind: of context.
        context_lengths: those whose nats it gives.
        parts: at least one.
    """

    name: str
    kind: Kind
    context_lengths: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return sum(part.tokens for part in self.parts)


def passes_of(
    model: nn.Module,
    documents: TokenReader,
    targets: TargetSet,
    context_lengths: Sequence[int],
    *,
    receptive_field: int | None,
    batch_tokens: int,
    streaming: bool,
) -> list[Pass]:
    """One pass for each context length and kind; one for all that hold the receptive field.

    Args:
        model: what is to be scored.
        documents: where the tokens are.
        targets: what is scored.
        context_lengths: increasing.
        receptive_field: of the model, None where it sees everything.
        batch_tokens: tokens of one forward pass.
        streaming: whether the contexts that hold the receptive field are one stream, where the model can.
    """
    least = max(PART_TOKENS, batch_tokens)
    score_windows = partial(target_nats, documents=documents, batch_tokens=batch_tokens)
    streamed: tuple[int, ...] = ()
    if streaming and receptive_field is not None and streams(model):
        streamed = tuple(c for c in context_lengths if c >= receptive_field)
    passes = []
    for c in context_lengths:
        if c not in streamed:
            windows = protocol_windows(targets.regions, c)
            passes.append(
                Pass(f"protocol-{c}", "protocol", (c,), _window_parts(windows, score_windows, least))
            )
    if streamed:
        assert receptive_field is not None
        score_regions = partial(
            streamed_nats, documents=documents, receptive_field=receptive_field, batch_tokens=batch_tokens
        )
        parts = _stream_parts(targets.regions, receptive_field, score_regions, least)
        passes.append(Pass("protocol-streamed", "protocol", streamed, parts))
    for c in context_lengths:
        windows = naive_windows(targets.regions, c)
        passes.append(Pass(f"naive-{c}", "naive", (c,), _window_parts(windows, score_windows, least)))
    return passes


def _window_parts(windows: Sequence[ScoredWindow], score: Callable[..., Any], least: int) -> tuple[Part, ...]:
    cut = _cut(windows, lambda window: window.end - window.start - 1, least)
    return tuple(Part(_targets(some), tokens, partial(score, windows=some)) for some, tokens in cut)


def _stream_parts(
    regions: Sequence[TargetRegion], receptive_field: int, score: Callable[..., Any], least: int
) -> tuple[Part, ...]:
    cut = _cut(regions, lambda region: region.end - region.first + receptive_field - 1, least)
    return tuple(Part(_targets(some), tokens, partial(score, regions=some)) for some, tokens in cut)


Scored = TypeVar("Scored", ScoredWindow, TargetRegion)


def _targets(scored: Sequence[ScoredWindow] | Sequence[TargetRegion]) -> int:
    return sum(each.end - each.first for each in scored)


def _cut(
    scored: Sequence[Scored], tokens_of: Callable[[Scored], int], least: int
) -> Iterator[tuple[Sequence[Scored], int]]:
    """Runs of at least so many tokens, but for the last, with their tokens."""
    start = tokens = 0
    for place, each in enumerate(scored):
        tokens += tokens_of(each)
        if tokens >= least or place == len(scored) - 1:
            yield scored[start : place + 1], tokens
            start, tokens = place + 1, 0
