"""All tokens of a store as one sequence behind the memory map."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray


class TokenStream:
    """All tokens of a store as one sequence, read from the memory map without copying where it can be.

    Args:
        dataset: One column `tokens` of little-endian binary, a row for a piece of a document.
        dtype: uint16 or uint32.

    Attributes:
        row_starts: int64 `[rows + 1]`, position of each row's first token.
    """

    def __init__(self, dataset: datasets.Dataset, dtype: np.dtype[Any]) -> None:
        self._dataset = dataset
        self._dtype = dtype
        self._map_blocks()

    def _map_blocks(self) -> None:
        self._blocks: list[NDArray[Any]] = []
        row_ends = [np.zeros(1, dtype=np.int64)]
        end = 0
        for block in self._dataset.data.table.column("tokens").chunks:
            _, offsets_buffer, values_buffer = block.buffers()
            offsets = np.frombuffer(offsets_buffer, dtype=np.int32)[block.offset :][: len(block) + 1]
            values = np.frombuffer(values_buffer or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
            self._blocks.append(values.view(self._dtype))
            row_ends.append(end + (offsets[1:] - offsets[0]).astype(np.int64) // self._dtype.itemsize)
            end += len(self._blocks[-1])
        self.row_starts: NDArray[np.int64] = np.concatenate(row_ends)
        self._block_ends = np.cumsum([len(block) for block in self._blocks])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle as the path of the store, not as its content."""
        return {"_dataset": self._dataset, "_dtype": self._dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the store again."""
        self.__dict__.update(state)
        self._map_blocks()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens from `start` up to `stop`, `[stop - start]` of uint16 or uint32."""
        parts = []
        number = int(np.searchsorted(self._block_ends, start, side="right"))
        while start < stop:
            block = self._blocks[number]
            block_start = int(self._block_ends[number]) - len(block)
            parts.append(block[start - block_start : stop - block_start])
            start += len(parts[-1])
            number += 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self._dtype)
