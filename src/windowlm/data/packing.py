"""Packs documents into sequences of equal length.

The documents of a split, one after the other, are one long stream of tokens. Sequence k takes tokens
`k * T` to `k * T + T - 1` as inputs and the tokens behind each as targets, so it reads one token more than it
feeds, and neighbours overlap by that token: every token that has a predecessor in its document is a target
exactly once an epoch. Without document masking every token of the stream that has a predecessor is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from windowlm.data.order import permutation
from windowlm.data.token_store import TokenSplit

UNSCORED = -100  # the index that torch's cross-entropy ignores
PADDING = -1

_DOCUMENTS, _SEQUENCES = 0, 1


class PackedSequences(torch.utils.data.Dataset[dict[str, NDArray[Any]]]):
    """Sequences by position, where positions count over all epochs without end.

    Args:
        split: The documents.
        sequence_length: Inputs of a sequence, T.
        seed: Documents and sequences are shuffled anew each epoch, by (seed, epoch); None keeps their order.
        padding_token: Input where there is no text: behind the last token.
        document_masking: False takes the documents of a sequence for one.

    Attributes:
        sequences_per_epoch: After so many positions every token has been a target once.
    """

    def __init__(
        self,
        split: TokenSplit,
        sequence_length: int,
        seed: int | None,
        padding_token: int,
        *,
        document_masking: bool = True,
    ) -> None:
        self._split = split
        self._length = sequence_length
        self._seed = seed
        self._padding_token = padding_token
        self._document_masking = document_masking
        self.sequences_per_epoch = -(-(split.token_count - 1) // sequence_length)
        self._epoch: int | None = None

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return self.sequences_per_epoch

    def __getitem__(self, position: int) -> dict[str, NDArray[Any]]:
        """See `sequence`."""
        return self.sequence(position)

    def sequence(self, position: int) -> dict[str, NDArray[Any]]:
        """The sequence at a position, a pure function of seed and position.

        Returns:
            Arrays `[T]`: `tokens` (int64); `targets` (int64, the next token, -100 across documents and in
            padding); `documents` (int32, from 0 on in each sequence, -1 for padding); `positions` (int64,
            from 0 on in each document and at the start of the sequence).
        """
        epoch, index = divmod(position, self.sequences_per_epoch)
        self._shuffle(epoch)
        start = int(self._sequence_order[index]) * self._length
        tokens = np.full(self._length + 1, self._padding_token, dtype=np.int64)
        documents = np.full(self._length + 1, PADDING, dtype=np.int32)
        positions = np.zeros(self._length + 1, dtype=np.int64)
        filled, number = 0, 0
        place = int(np.searchsorted(self._document_ends, start, side="right"))
        while filled < len(tokens) and place < len(self._document_order):
            document = int(self._document_order[place])
            offset = start + filled - (int(self._document_ends[place]) - int(self._split.lengths[document]))
            part = self._split.read(document, offset, offset + len(tokens) - filled)
            span = slice(filled, filled + len(part))
            tokens[span], documents[span], positions[span] = part, number, np.arange(len(part))
            filled, number, place = filled + len(part), number + 1, place + 1
        if not self._document_masking:
            documents[:filled], positions[:filled] = 0, np.arange(filled)
        scored = (documents[1:] == documents[:-1]) & (documents[1:] != PADDING)
        return {
            "tokens": tokens[:-1],
            "targets": np.where(scored, tokens[1:], UNSCORED),
            "documents": documents[:-1],
            "positions": positions[:-1],
        }

    def _shuffle(self, epoch: int) -> None:
        """Lay out an epoch: the order of documents and sequences, and where each document ends."""
        if epoch == self._epoch:
            return
        count = len(self._split)
        if self._seed is None:
            self._document_order = np.arange(count)
            self._sequence_order = np.arange(self.sequences_per_epoch)
        else:
            self._document_order = permutation(count, self._seed, epoch, _DOCUMENTS)
            self._sequence_order = permutation(self.sequences_per_epoch, self._seed, epoch, _SEQUENCES)
        self._document_ends = np.cumsum(self._split.lengths[self._document_order])
        self._epoch = epoch


def stack_sequences(sequences: list[dict[str, NDArray[Any]]]) -> dict[str, Tensor]:
    """A batch: `tokens_BT`, `targets_BT`, `documents_BT` and `positions_BT`."""
    return {
        f"{name}_BT": torch.from_numpy(np.stack([sequence[name] for sequence in sequences]))
        for name in sequences[0]
    }
