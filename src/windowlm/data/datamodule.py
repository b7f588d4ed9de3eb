"""The data loaders, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from windowlm.data.config import DataConfig
from windowlm.data.packing import UNSCORED, PackedSequences, stack_sequences
from windowlm.data.token_store import PreparedData, TokenSplit

Batch = dict[str, Tensor]


class EndlessBatches(Sampler[list[int]]):
    """Positions of the sequences of each batch, from any batch on and without end.

    Args:
        batch_size: Sequences a batch, those of all readers together.
        start: First batch.
        reader: Which of the readers this is.
        readers: How many share a batch, in equal parts.
    """

    def __init__(self, batch_size: int, start: int = 0, reader: int = 0, readers: int = 1) -> None:
        assert batch_size % readers == 0
        self.batch_size = batch_size
        self.start = start
        self.reader = reader
        self.readers = readers

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of positions."""
        for batch in count(self.start):
            part = self.batch_size // self.readers
            first = batch * self.batch_size + self.reader * part
            yield list(range(first, first + part))


class SharedSequences(Dataset[dict[str, NDArray[Any]]]):
    """Sequences in batches that readers share; where one has no sequence left it reads one without targets.

    Args:
        sequences: Those of a split.
    """

    BLANK = -1

    def __init__(self, sequences: PackedSequences) -> None:
        self.sequences = sequences

    def __getitem__(self, position: int) -> dict[str, NDArray[Any]]:
        """The sequence at a position."""
        if position != self.BLANK:
            return self.sequences[position]
        first = self.sequences[0]
        return {**first, "targets": np.full_like(first["targets"], UNSCORED)}


class DocumentDataModule(lightning.LightningDataModule):
    """Batches of packed documents: `tokens_BT`, `targets_BT`, `documents_BT`, `positions_BT`.

    The state is one integer, `next_batch`, the number of batches trained on. Workers read ahead, so the data
    cannot know it: the training loop sets it after each batch. Training is one endless epoch.

    Args:
        prepared: Prepared tokens.
        data: Sequence length, batch size, validation tokens and workers.
        seed: Order of documents and sequences.
        reader: Which of those that share each batch this is.
        readers: How many share it.
    """

    def __init__(
        self, prepared: PreparedData, data: DataConfig, seed: int, reader: int = 0, readers: int = 1
    ) -> None:
        super().__init__()
        self.reader, self.readers = reader, readers
        self.prepared = prepared
        self.data = data
        self.next_batch = 0
        self.train_sequences = self._pack(prepared.train, seed)
        self.validation_sequences = self._pack(prepared.validation, None)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled sequences without end, from `next_batch` on."""
        batches = EndlessBatches(self.data.rows, self.next_batch, self.reader, self.readers)
        return self._load(self.train_sequences, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """The first `validation_tokens` of the validation split, in order; the last batch may be smaller."""
        positions, size = range(self._validation_sequences()), self.data.rows
        batches = []
        for start in range(0, len(positions), size):
            own = list(positions[start : start + size])[self.reader :: self.readers]
            # All readers have as many batches, as they may wait for one another in each.
            batches.append(own or [SharedSequences.BLANK])
        return self._load(SharedSequences(self.validation_sequences), batches)

    def validation_bytes(self) -> Iterator[bytes]:
        """The UTF-8 bytes that validation reads, document by document, without end marks.

        The first token of each document is among them, though with document masking nothing predicts it.
        """
        split, left = self.prepared.validation, self._validation_sequences() * self.data.sequence_length + 1
        for document in range(len(split)):
            tokens = split.read(document, 0, left)
            yield self.prepared.tokenizer.decode_bytes(tokens)
            left -= len(tokens)
            if not left:
                return

    def state_dict(self) -> dict[str, int]:
        """The batch to train on next."""
        return {"next_batch": self.next_batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on at the batch of the state; loaders made from now on start there."""
        self.next_batch = state_dict["next_batch"]

    def _validation_sequences(self) -> int:
        all_sequences = len(self.validation_sequences)
        if self.data.validation_tokens is None:
            return all_sequences
        return min(all_sequences, -(-self.data.validation_tokens // self.data.sequence_length))

    def _pack(self, split: TokenSplit, seed: int | None) -> PackedSequences:
        padding_token = self.prepared.tokenizer.end_of_document
        return PackedSequences(
            split,
            self.data.sequence_length,
            seed,
            padding_token,
            document_masking=self.data.document_masking,
        )

    def _load(
        self, sequences: PackedSequences | SharedSequences, batches: EndlessBatches | list[list[int]]
    ) -> DataLoader[Any]:
        return DataLoader(
            sequences,
            batch_sampler=batches,
            collate_fn=stack_sequences,
            num_workers=self.data.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.data.workers > 0,
        )
