"""A KV cache that goes on token by token in tensors of fixed shape, so that a GPU can replay one graph.

`KVCache` counts in Python where tokens stand, and the shapes of what it gives follow from the count. Here the
count is a tensor, each layer reads all of its slots, and a mask says which of them hold what is seen.

Shapes: B batch (a leading 1 stands for any), 1 the token of a row, S slots or sinks, E earlier tokens,
H query heads, K key-value heads, D head dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .document_layout import PADDING
from .kv_cache import Chunk, KVCache, LayerCache, Slots, check_no_gradients
from .step_attention import attend_one
from .window import Finish, Places, Visibility, unfinished


@dataclass(frozen=True, eq=False)
class SeenSlots(Visibility):
    """Which slots one token a row sees.

    Attributes:
        seen: bool [B or 1, S].
    """

    seen: Tensor | None = None

    def attend(
        self,
        attention: Callable[..., Tensor],
        query_BTHD: Tensor,
        key_BTKD: Tensor,
        value_BTKD: Tensor,
        *,
        sent: Any = None,
        finish: Finish = unfinished,
        finish_with: Tensor | None = None,
        sink_logits_H: Tensor | None = None,
        logit_cap: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of one query a row, by `attend_one`.

        Raises:
            ValueError: where a backend is named, or weights are to be dropped.
        """
        backend, dropout = options.get("backend", "auto"), options.get("dropout", 0.0)
        if backend != "auto" or dropout:
            raise ValueError(
                f"backend={backend!r}, dropout={dropout}: a StepCache computes in one way and drops nothing; "
                "try backend='auto' and eval()"
            )
        assert self.seen is not None
        output_BTHD = attend_one(query_BTHD, key_BTKD, value_BTKD, self.seen, sink_logits_H, logit_cap)
        return finish(output_BTHD, finish_with)


class StepSlots:
    """The slots of layers of one window, and which of them the present token sees.

    Args:
        slots: as `KVCache` left them.
        size: how many are allocated.
        place: of the token that comes.
    """

    def __init__(self, slots: Slots, size: int, place: "Place") -> None:
        self.window, self.sinks, self.rolls = slots.window, slots.sinks, slots.rolls
        self.place = place
        self.visibility: Visibility = SeenSlots()
        self.positions_BS, self.documents_BS = slots.positions_BS, slots.documents_BS
        self._chunk: Chunk | None = None
        self._shown = Visibility(window=slots.window, sinks=slots.sinks)
        self._slot_1 = place.column
        self._slots_1S = torch.arange(size, device=place.column.device)[None]

    @property
    def chunk(self) -> Chunk:
        """The token that is read now."""
        assert self._chunk is not None
        return self._chunk

    def advance(self, chunk: Chunk) -> None:
        """Take in where the token of each row stands."""
        self._chunk, column_1 = chunk, self.place.column
        if self.rolls:
            assert self.window is not None
            self._slot_1 = self.sinks + (column_1 - self.sinks) % self.window
        documents_BT, position_B1 = chunk.documents, chunk.positions
        if documents_BT is None:
            # A ring that is full holds what is seen, and nothing else.
            self.visibility = SeenSlots(seen=self._slots_1S <= column_1)
            return
        assert self.positions_BS is not None
        assert self.documents_BS is not None
        in_ring_B1 = documents_BT
        if self.rolls and self.sinks:
            in_ring_B1 = documents_BT.masked_fill(position_B1 < self.sinks, PADDING)
        self.extend(self.positions_BS, position_B1.expand_as(documents_BT))
        self.extend(self.documents_BS, documents_BT, in_ring_B1)
        seen_B1S = self._shown.between(
            Places(position_B1, self.positions_BS, documents_BT, self.documents_BS)
        )
        self.visibility = SeenSlots(seen=seen_B1S[:, 0])

    def extend(
        self,
        kept_BS: Tensor | None,
        new_BT: Tensor,
        new_in_ring_BT: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write the token into its slot; the slots, and all of them as what may be seen."""
        assert kept_BS is not None
        in_ring_BT = new_BT if new_in_ring_BT is None else new_in_ring_BT
        kept_BS.index_copy_(1, self._slot_1, in_ring_BT.to(kept_BS.dtype))
        if self.rolls and self.sinks and self.chunk.documents is not None:
            # A row's first columns may be padding, so that sinks come while others' rings roll.
            start_B1 = self.place.start
            assert start_B1 is not None
            now_BS = start_B1 + self._slots_1S[:, : self.sinks] == self.place.column
            now_BS = now_BS.view(*now_BS.shape, *[1] * (new_BT.dim() - 2))
            pinned_BS = kept_BS[:, : self.sinks]
            pinned_BS.copy_(torch.where(now_BS, new_BT.to(kept_BS.dtype), pinned_BS))
        return kept_BS, kept_BS.to(new_BT.dtype)


class StepTail:
    """The last few entries of a sequence, zeros in front where there are fewer; see `kv_cache.Tail`."""

    def __init__(self, kept_BE: Tensor, length: int) -> None:
        missing = length - kept_BE.shape[1]
        front_BE = kept_BE.new_zeros((len(kept_BE), missing, *kept_BE.shape[2:]))
        self.kept_BE = torch.cat([front_BE, kept_BE], 1)

    def exchange(self, new_BT: Tensor) -> Tensor:
        """Keep the new entry, and give those before it, [B, E, ...]."""
        earlier_BE = self.kept_BE.clone()
        self.kept_BE.copy_(torch.cat([earlier_BE, new_BT], 1)[:, 1:])
        return earlier_BE


class StepLayer:
    """Keys and values that one layer keeps; `StepCache` makes one for each."""

    def __init__(self, layer: LayerCache, slots: StepSlots) -> None:
        self.slots, self.dtype = slots, layer.dtype
        assert layer.key_BSKD is not None
        assert layer.value_BSKD is not None
        self.key_BSKD, self.value_BSKD = layer.key_BSKD, layer.value_BSKD
        self.tails = _step_tails(layer)

    def extend(self, key_B1KD: Tensor, value_B1KD: Tensor) -> tuple[Tensor, Tensor]:
        """All slots of keys and values [B, S, K, D], the token's own written.

        Raises:
            ValueError: where gradients are recorded.
        """
        check_no_gradients(key_B1KD, value_B1KD)
        _, key_BSKD = self.slots.extend(self.key_BSKD, key_B1KD)
        _, value_BSKD = self.slots.extend(self.value_BSKD, value_B1KD)
        return key_BSKD, value_BSKD

    def earlier(self, name: str, new_BT: Tensor, length: int) -> Tensor:
        """The `length` entries [B, E, ...] that came before the token's under this name."""
        return self.tails[name].exchange(new_BT)


@dataclass(frozen=True, eq=False)
class Place:
    """Where the next token of each row stands; `step` moves it on in place.

    Attributes:
        column: in the row, padding included, int64 [1].
        behind: how many tokens directly before it are of its document, int64 [B or 1, 1].
        start: where rows differ, the column of its document's first token, int64 [B, 1].
        document: where rows differ, its document, int32 [B, 1].
    """

    column: Tensor
    behind: Tensor
    start: Tensor | None
    document: Tensor | None

    def chunk(self) -> Chunk:
        """What the layers are told."""
        position_B1 = self.column[None].clone()
        if self.start is not None:
            position_B1 = position_B1 - self.start
        return Chunk(0, 1, position_B1, self.behind.clone(), self.document)

    def step(self) -> None:
        """Move on by a token."""
        torch._foreach_add_(list(self.counters()), 1)

    def counters(self) -> Iterator[Tensor]:
        """What `step` changes."""
        yield self.column
        yield self.behind


class StepCache:
    """Goes on where a `KVCache` stands, whose slots it takes over; that one is spent.

    Give it to `Decoder.hidden` with one token a row, at most as often as its capacity has room. In each layer
    attention is that of `attend_one`, so the layers' own `backend` must be "auto".

    Args:
        cache: of at least as many tokens as any layer has sinks, with a capacity where a layer has no window.

    Raises:
        ValueError: for a cache that is shorter, that a layer has not read to its end, or that could outgrow
            its slots.
    """

    def __init__(self, cache: KVCache) -> None:
        sinks = max(slots.sinks for slots in cache.slots.values())
        if cache.tokens < max(sinks, 1):
            raise ValueError(f"a cache of {cache.tokens} tokens: it goes on in steps from {max(sinks, 1)} on")
        if any(layer.tokens != cache.tokens for layer in cache.layers):
            raise ValueError("a cache that a layer has not read to its end: call each after each advance()")
        if cache.capacity is None and any(not slots.rolls for slots in cache.slots.values()):
            raise ValueError("a cache without capacity grows; make one of capacity=the tokens of a row")
        self.place = Place(*cache.next_place())
        made: dict[Slots, StepSlots] = {}
        for layer in cache.layers:
            if layer.slots not in made:
                assert layer.key_BSKD is not None
                made[layer.slots] = StepSlots(layer.slots, layer.key_BSKD.shape[1], self.place)
        # Not by their names: a compiled graph would be bound to these very objects.
        self.slots = list(made.values())
        self.layers = [StepLayer(layer, made[layer.slots]) for layer in cache.layers]
        self.tails = _step_tails(cache)
        self.room = None if cache.capacity is None else cache.capacity - cache.tokens

    def advance(
        self, batch: int, tokens: int, device: torch.device, documents_BT: Tensor | None = None
    ) -> Chunk:
        """Announce the next token of every row, of the document that goes on.

        Raises:
            ValueError: for more than a token a row, or documents.
        """
        if tokens != 1 or documents_BT is not None:
            raise ValueError(f"{tokens} tokens a row: one, of the document that goes on, is allowed")
        chunk = self.place.chunk()
        for slots in self.slots:
            slots.advance(chunk)
        return chunk

    def earlier(self, name: str, new_BT: Tensor, length: int) -> Tensor:
        """Like `StepLayer.earlier`, for what belongs to no layer."""
        return self.tails[name].exchange(new_BT)

    def take_room(self) -> None:
        """Count a token on the host, which a replayed graph does not do.

        Raises:
            ValueError: the capacity is spent.
        """
        if self.room == 0:
            raise ValueError("the cache is full; make one of a larger capacity")
        self.room = None if self.room is None else self.room - 1

    def moving_state(self) -> Iterator[Tensor]:
        """What a step changes besides the slots of its token."""
        yield from self.place.counters()
        for tails in (self.tails, *(layer.tails for layer in self.layers)):
            yield from (tail.kept_BE for tail in tails.values())


def _step_tails(owner: LayerCache | KVCache) -> dict[str, StepTail]:
    return {
        name: StepTail(tail.kept_BE, tail.length)
        for name, tail in owner.tails.items()
        if tail.kept_BE is not None
    }
