"""The data loaders, resumable at any batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from windowlm.data.config import DataConfig
from windowlm.data.packing import PackedSequences, stack_sequences
from windowlm.data.token_store import PreparedData, TokenSplit

Batch = dict[str, Tensor]


class EndlessBatches(Sampler[list[int]]):
    """Positions of the sequences of each batch, from any batch on and without end.

    Args:
        batch_size: Sequences a batch and device.
        start: First batch.
        rank: Which of the devices this is.
        devices: How many devices share a batch's step; together they read consecutive positions.
    """

    def __init__(self, batch_size: int, start: int = 0, rank: int = 0, devices: int = 1) -> None:
        self.batch_size = batch_size
        self.start = start
        self.rank = rank
        self.devices = devices

    def __iter__(self) -> Iterator[list[int]]:
        """Yield lists of positions."""
        for batch in count(self.start):
            first = (batch * self.devices + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class DocumentDataModule(lightning.LightningDataModule):
    """Batches of packed documents: `tokens_BT`, `targets_BT`, `documents_BT`, `positions_BT`.

    The state is one integer, `next_batch`, the number of batches trained on. Workers read ahead, so the data
    cannot know it: the training loop sets it after each batch. Training is one endless epoch.

    Args:
        prepared: Prepared tokens.
        data: Sequence length, batch size, validation tokens and workers.
        seed: Order of documents and sequences.
    """

    def __init__(self, prepared: PreparedData, data: DataConfig, seed: int) -> None:
        super().__init__()
        self.prepared = prepared
        self.data = data
        self.next_batch = 0
        self.train_sequences = self._pack(prepared.train, seed)
        self.validation_sequences = self._pack(prepared.validation, None)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled sequences without end, from `next_batch` on."""
        rank, devices = self._rank()
        batches = EndlessBatches(self.data.batch_size, self.next_batch, rank, devices)
        return self._load(self.train_sequences, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """The first `validation_tokens` of the validation split, in order; the last batch may be smaller."""
        rank, devices = self._rank()
        positions = range(rank, self._validation_sequences(), devices)
        size = self.data.batch_size
        batches = [list(positions[start : start + size]) for start in range(0, len(positions), size)]
        return self._load(self.validation_sequences, batches)

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

    def _load(self, sequences: PackedSequences, batches: EndlessBatches | list[list[int]]) -> DataLoader[Any]:
        return DataLoader(
            sequences,
            batch_sampler=batches,
            collate_fn=stack_sequences,
            num_workers=self.data.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.data.workers > 0,
        )

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
