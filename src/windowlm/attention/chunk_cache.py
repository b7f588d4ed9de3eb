"""A chunk that a KV cache takes in, as tensors alone: a compiled graph reads it, and it is written behind it.

Shapes: B batch (a leading 1 stands for any), T tokens of the chunk, S keys before it and its own, K key-value
heads, D head dimension.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .kv_cache import Chunk, KVCache, LayerCache, Slots, Tail, as_kept, check_no_gradients


class ChunkSlots:
    """What layers of one window are told of the chunk."""

    def __init__(self, slots: Slots, device: torch.device) -> None:
        self.window, self.sinks, self.visibility = slots.window, slots.sinks, slots.visibility
        self.refill_S = slots.refill(device)
        self._chunk: Chunk | None = None

    @property
    def chunk(self) -> Chunk:
        """The tokens that are read now."""
        assert self._chunk is not None
        return self._chunk

    def advance(self, chunk: Chunk) -> None:
        """Take in where the tokens stand."""
        self._chunk = chunk


class ChunkLayer:
    """Keys and values before the chunk, and once a layer has read it those of the chunk or of all slots."""

    def __init__(self, layer: LayerCache, slots: ChunkSlots, dtype: torch.dtype) -> None:
        self.slots, self.dtype = slots, layer.dtype
        self.before = layer.before(dtype)
        self.tails = _copied(layer.tails)
        self._read: tuple[Tensor, Tensor] | None = None

    def extend(self, key_BTKD: Tensor, value_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, K, D] that the chunk's tokens attend over.

        Raises:
            ValueError: where gradients are recorded.
        """
        check_no_gradients(key_BTKD, value_BTKD)
        key_BTKD, value_BTKD = as_kept(key_BTKD, self.dtype), as_kept(value_BTKD, self.dtype)
        key_BSKD, value_BSKD = key_BTKD, value_BTKD
        if self.before is not None:
            key_BSKD = torch.cat([self.before[0], key_BTKD], 1)
            value_BSKD = torch.cat([self.before[1], value_BTKD], 1)
        # A graph copies in fewer and faster kernels than come behind it.
        refill_S, dtype = self.slots.refill_S, key_BTKD.dtype if self.dtype is None else self.dtype
        if refill_S is None:
            self._read = key_BTKD.contiguous(), value_BTKD.contiguous()
        else:
            key, value = (seen.index_select(1, refill_S).to(dtype) for seen in (key_BSKD, value_BSKD))
            self._read = key, value
        return key_BSKD, value_BSKD

    def earlier(self, name: str, new_BT: Tensor, length: int) -> Tensor | None:
        """As `LayerCache.earlier`."""
        return self.tails.setdefault(name, Tail(length)).exchange(new_BT)

    def write(self, kept: LayerCache) -> None:
        """Let the layer's cache keep what was read."""
        assert self._read is not None
        keep = kept.write if self.slots.refill_S is None else kept.replace
        keep(*self._read)
        kept.tails = self.tails


class ChunkCache:
    """The next tokens of every row; give it to `Decoder.hidden` with them, then call `write`.

    Rows are read as often as the caller likes: nothing changes in the cache before it is written.

    Args:
        cache: that takes the tokens in.
        batch, tokens, device, documents_BT: as of `KVCache.advance`; two tokens or more.
        dtype: of the layers' keys and values.

    Raises:
        ValueError: as `KVCache.advance`.
    """

    def __init__(
        self,
        cache: KVCache,
        batch: int,
        tokens: int,
        device: torch.device,
        documents_BT: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        assert tokens > 1
        self._cache = cache
        chunk = cache.advance(batch, tokens, device, documents_BT)
        self.positions, self.behind, self.documents = chunk.positions, chunk.behind, chunk.documents
        made = {slots: ChunkSlots(slots, device) for slots in cache.slots.values()}
        for slots in made.values():
            slots.visibility.prepare(batch)
        self.slots = list(made.values())
        self.layers = [ChunkLayer(layer, made[layer.slots], dtype) for layer in cache.layers]
        self.tails = _copied(cache.tails)

    def advance(
        self, batch: int, tokens: int, device: torch.device, documents_BT: Tensor | None = None
    ) -> Chunk:
        """Announce the chunk to the layers; its documents are known."""
        assert documents_BT is None
        chunk = Chunk(0, tokens, self.positions, self.behind, self.documents)
        for slots in self.slots:
            slots.advance(chunk)
        return chunk

    def earlier(self, name: str, new_BT: Tensor, length: int) -> Tensor | None:
        """As `KVCache.earlier`."""
        return self.tails.setdefault(name, Tail(length)).exchange(new_BT)

    def tensors_that_vary(self, tokens_BT: Tensor) -> Iterator[Tensor]:
        """Tensors that a graph reads, whose first two dimensions another batch or chunk has otherwise."""
        yield from (tokens_BT, self.positions, self.behind)
        if self.documents is not None:
            yield self.documents
        for layer in self.layers:
            yield from layer.before or ()

    def write(self) -> None:
        """Let the cache keep what was read."""
        for kept, layer in zip(self._cache.layers, self.layers, strict=True):
            layer.write(kept)
        self._cache.tails = self.tails


def _copied(tails: dict[str, Tail]) -> dict[str, Tail]:
    return {name: tail.copied() for name, tail in tails.items()}
