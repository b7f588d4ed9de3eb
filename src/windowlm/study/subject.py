"""What the measures look at: a scored run with its model, texts and losses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from windowlm.evaluation.target_losses import TargetLosses
from windowlm.evaluation.targets import ScoredWindow
from windowlm.evaluation.token_loss import LanguageModel, target_nats
from windowlm.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A run that has been scored.

    Attributes:
        model: inside ``precision.scoring``, on its device.
        tokenizer: the run's.
        texts: text of each scored document by its hash.
        losses: nats of every target.
        training_length: tokens of a training sequence.
        batch_tokens: tokens of one forward pass.
    """

    model: nn.Module
    tokenizer: Tokenizer
    texts: dict[str, str]
    losses: TargetLosses
    training_length: int
    batch_tokens: int

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device

    @cached_property
    def data(self) -> dict[str, bytes]:
        """UTF-8 bytes of each scored document by its hash."""
        return {digest: text.encode() for digest, text in self.texts.items()}

    @property
    def window_bytes(self) -> int:
        """Bytes of text that a training sequence holds on average."""
        mean = float(self.losses.byte_count.sum()) / len(self.losses.byte_count)
        return int(self.training_length * mean)

    def encode(self, pieces: Sequence[bytes]) -> list[npt.NDArray[np.int64]]:
        """Tokens of each piece by itself, so that no token crosses from one into the next."""
        return [self.tokenizer.encode(piece.decode()).astype(np.int64) for piece in pieces]

    def tail_nats(
        self, sequences: Sequence[npt.NDArray[np.int64]], first_scored: Sequence[int]
    ) -> list[npt.NDArray[np.float64]]:
        """Nats of the tokens of each sequence from ``first_scored`` on; each is one document.

        Args:
            sequences: token ids.
            first_scored: at least 1, of each.
        """
        nats: list[npt.NDArray[np.float64]] = [np.empty(0)] * len(sequences)
        for first in sorted(set(first_scored)):
            chosen = [index for index, other in enumerate(first_scored) if other == first]
            windows = [ScoredWindow(index, 0, first, len(sequences[index])) for index in chosen]
            found = target_nats(
                self._language_model,
                _Sequences(sequences),
                windows,
                device=self.device,
                batch_tokens=self.batch_tokens,
            )
            ends = np.cumsum([window.end - window.first for window in windows])
            for index, piece in zip(chosen, np.split(found, ends[:-1]), strict=True):
                nats[index] = piece
        return nats

    def next_token_logits(self, sequences: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float64]:
        """Logits of the token after each sequence, ``[sequences, V]``."""
        rows = []
        for sequence in sequences:
            hidden_1TD = self._language_model.hidden(torch.from_numpy(sequence)[None].to(self.device))
            rows.append(self._language_model.head(hidden_1TD[0, -1]).double().cpu().numpy())
        return np.stack(rows)

    @property
    def _language_model(self) -> LanguageModel:
        return self.model  # type: ignore[return-value]  # nn.Module hides its parts from the type checker


@dataclass(frozen=True)
class _Sequences:
    """Sequences in memory as the documents of windows."""

    tokens: Sequence[npt.NDArray[np.int64]]

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Token ids ``start`` to ``stop`` of a sequence."""
        return self.tokens[document][start:stop]
