"""The rolling KV cache: a chunk attends over the old ring and itself, then overwrites the oldest keys.

A layer with a window of W keeps the keys and values of the last W tokens in a ring, and beside it those of
the document's first tokens, its sinks. Token number c of a row stands in slot S + (c - S) mod W; for W = 4
and S = 1, after the tokens 0 to 9:

    slot    0   1   2   3   4
    token   0   9   6   7   8

A layer without a window keeps all. Reading before writing is what lets a chunk be longer than the window: its
first token still sees keys that its last one overwrites. Only a single token, which sees no key that it
overwrites, writes first and so needs no copy of the ring.

Shapes: B batch, T tokens of a chunk, S slots (of a document: sinks), E earlier tokens, K key-value heads,
D head dimension; a leading 1 stands for any batch.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from .document_layout import PADDING, document_starts, run_starts
from .window import Visibility, check_sinks, check_window, outside_inference_mode

NO_TOKEN = PADDING - 1
GROWTH = 1.5
LEAST_SLOTS = 64
Prepared = TypeVar("Prepared")


@dataclass(frozen=True, eq=False)
class Chunk:
    """The tokens that are read now, the same for all layers.

    Attributes:
        start, stop: their place in the row, counted from its first token, padding included.
        positions: place of each in its document, int64 [B or 1, T].
        behind: how many tokens directly before each are of its document, [B or 1, T].
        documents: document of each, int32 [B, T]; None where the rows are one document each, without padding.
        batch: B; None where it is not checked.
    """

    start: int
    stop: int
    positions: Tensor
    behind: Tensor
    documents: Tensor | None
    batch: int | None = None
    _prepared: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """T."""
        return self.stop - self.start

    def once(self, name: Hashable, prepare: Callable[[], Prepared]) -> Prepared:
        """What `prepare` returns, made at the first call under this name."""
        if name not in self._prepared:
            self._prepared[name] = prepare()
        prepared: Prepared = self._prepared[name]  # type: ignore[assignment]
        return prepared


def check_no_gradients(key_BTKD: Tensor, value_BTKD: Tensor) -> None:
    """Raise ValueError where gradients of keys or values are recorded."""
    if torch.is_grad_enabled() and (key_BTKD.requires_grad or value_BTKD.requires_grad):
        raise ValueError("a KV cache carries no gradients: call the layers under torch.no_grad()")


def as_kept(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The same with the numbers that a cache of this dtype keeps: rounded before the chunk itself reads them,
    so that the same are read however the text is cut.
    """
    return tensor if dtype is None else tensor.to(dtype).to(tensor.dtype)


class Slots:
    """Which tokens the slots of layers of one window hold, and what a chunk may see of them.

    Where rows differ (documents, padding), each slot stores the absolute position and the document of its
    token, and these decide what is visible; elsewhere both follow from the number of tokens.

    Attributes:
        window, sinks: of the layers.
        size: slots that are never exceeded; None where there is no bound.
        rolls: whether old tokens are overwritten.
        visibility: what the tokens of the present chunk see among the keys that `extend` gives.
        positions_BS, documents_BS: of the tokens in the slots, where rows differ.
    """

    def __init__(self, window: int | None, sinks: int, capacity: int | None) -> None:
        self.window, self.sinks = window, sinks
        bound = None if window is None else window + sinks
        self.rolls = bound is not None and (capacity is None or bound < capacity)
        self.size = bound if self.rolls else capacity
        self.visibility = Visibility()
        self.positions_BS: Tensor | None = None
        self.documents_BS: Tensor | None = None
        self._chunk: Chunk | None = None
        self._pins: tuple[Tensor, Tensor] | None = None

    @property
    def chunk(self) -> Chunk:
        """The tokens that are read now.

        Raises:
            ValueError: where no chunk was announced.
        """
        if self._chunk is None:
            raise ValueError("the cache expects no tokens: call its advance() before the layers")
        return self._chunk

    def room(self, stop: int, present: int) -> int:
        """Slots to allocate for `stop` tokens where `present` are allocated."""
        if self.size is not None:
            return self.size
        return present if stop <= present else max(stop, LEAST_SLOTS, int(GROWTH * present))

    def advance(self, chunk: Chunk, whole: Visibility | None, pins: tuple[Tensor, Tensor] | None) -> None:
        """Take in where the tokens of a chunk stand.

        Args:
            chunk: the tokens.
            whole: what they see of one another without a window, for a first chunk.
            pins: for rows that differ, the place in the chunk of each sink of the document that goes on, and
                whether it is there at all, [B, S]; None where no sink is in the chunk.
        """
        self._chunk, self._pins = chunk, pins
        documents_BT = chunk.documents
        key_positions_BS = key_documents_BS = None
        if documents_BT is not None:
            # A sink stands beside the ring: seen there too, it would count twice.
            ring_documents_BT = documents_BT
            if self.rolls and self.sinks:
                ring_documents_BT = documents_BT.masked_fill(chunk.positions < self.sinks, PADDING)
            self.positions_BS, key_positions_BS = self.extend(self.positions_BS, chunk.positions)
            self.documents_BS, key_documents_BS = self.extend(
                self.documents_BS, documents_BT, ring_documents_BT, fill=PADDING
            )
        if whole is not None:
            self.visibility = replace(whole.with_window(self.window), sinks=self.sinks)
        elif documents_BT is not None:
            self.visibility = Visibility(
                self.window,
                True,
                self.sinks,
                chunk.positions,
                documents_BT,
                key_positions_BS,
                key_documents_BS,
            )
        elif chunk.tokens == 1:
            # The last W tokens and the sinks are there, nothing else.
            self.visibility = Visibility()
        else:
            # In their order, sinks first, the keys are a row from which only hidden tokens were cut.
            self.visibility = Visibility(self.window, True, self.sinks)

    def extend(
        self,
        kept_BS: Tensor | None,
        new_BT: Tensor,
        new_in_ring_BT: Tensor | None = None,
        *,
        fill: int = 0,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Write the chunk into slots and give what its tokens attend over.

        Args:
            kept_BS: the slots, [B, S, ...]; None where nothing is kept yet.
            new_BT: what belongs to the chunk's tokens, [B, T, ...].
            new_in_ring_BT: what is written into the ring, where that differs from what belongs to sinks.
            fill: value of slots that hold nothing.
            dtype: of the slots; None for that of `new_BT`.

        Returns:
            The slots, and [B, keys, ...] in the order of the tokens (a single token: in that of the slots).
        """
        start, stop = self.chunk.start, self.chunk.stop
        in_ring_BT = new_BT if new_in_ring_BT is None else new_in_ring_BT
        kept_BS = self._allocated(kept_BS, new_BT, fill, dtype)
        if self.rolls and self.chunk.tokens > 1:
            old = [piece.to(new_BT.dtype) for piece in self._in_order(kept_BS, start)]
            seen_BS = torch.cat([*old, new_BT], 1) if old else new_BT
            self._write(kept_BS, new_BT, in_ring_BT)
        else:
            self._write(kept_BS, new_BT, in_ring_BT)
            filled = stop if self.size is None else min(stop, self.size)
            seen_BS = new_BT if start == 0 else kept_BS[:, :filled].to(new_BT.dtype)
        return kept_BS, seen_BS

    def before(self, kept_BS: Tensor | None) -> Tensor | None:
        """What slots hold of the tokens before the chunk, in their order; None where there are none."""
        start = self.chunk.start
        if kept_BS is None or start == 0:
            return None
        if not self.rolls:
            return kept_BS[:, :start]
        pieces = list(self._in_order(kept_BS, start))
        # A part of the ring has other strides than a copy, for which a graph would be compiled anew.
        return pieces[0] if len(pieces) == 1 and pieces[0].is_contiguous() else torch.cat(pieces, 1)

    def refill(self, device: torch.device) -> Tensor | None:
        """Which of the keys that `before` and the chunk give each slot holds behind the chunk, int64 [S].

        None where slots stay empty, are not overwritten, or hold sinks that stand elsewhere in each row.
        """
        start, stop = self.chunk.start, self.chunk.stop
        if not self.rolls or self._pins is not None:
            return None
        assert self.window is not None
        assert self.size is not None
        if stop < self.size:
            return None
        slot_S = torch.arange(self.size, device=device)
        newest_S = stop - 1 - (stop - 1 - slot_S) % self.window
        # Between sinks and ring, `before` leaves out what is overwritten.
        left_out = max(start - self.size, 0)
        return torch.where(slot_S < self.sinks, slot_S, newest_S - left_out)

    def write(self, kept_BS: Tensor | None, new_BT: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The slots, with the chunk written; as `extend`."""
        kept_BS = self._allocated(kept_BS, new_BT, 0, dtype)
        self._write(kept_BS, new_BT, new_BT)
        return kept_BS

    def _allocated(
        self, kept_BS: Tensor | None, new_BT: Tensor, fill: int, dtype: torch.dtype | None
    ) -> Tensor:
        present = 0 if kept_BS is None else kept_BS.shape[1]
        slots = self.room(self.chunk.stop, present)
        if kept_BS is not None and slots == present:
            return kept_BS
        # Not empty: what a hidden slot holds is multiplied by zero, and not-a-number would stay one.
        size = (len(new_BT), slots, *new_BT.shape[2:])
        room_BS = outside_inference_mode(lambda: new_BT.new_full(size, fill, dtype=dtype))
        if kept_BS is not None:
            room_BS[:, :present] = kept_BS
        return room_BS

    def _in_order(self, kept_BS: Tensor, start: int) -> Iterator[Tensor]:
        """The slots of a ring as the row's tokens follow one another, sinks first."""
        assert self.window is not None
        if start <= self.sinks + self.window:
            pieces = [slice(0, start)]
        else:
            oldest = self._slot(start)
            pieces = [slice(0, self.sinks), slice(oldest, None), slice(self.sinks, oldest)]
        yield from (kept_BS[:, piece] for piece in pieces if kept_BS[:, piece].shape[1])

    def _slot(self, column: int) -> int:
        """Of the ring, for a token that is no sink of the row."""
        assert self.window is not None
        return self.sinks + (column - self.sinks) % self.window

    def _write(self, kept_BS: Tensor, new_BT: Tensor, in_ring_BT: Tensor) -> None:
        start, stop = self.chunk.start, self.chunk.stop
        if not self.rolls:
            kept_BS[:, start:stop] = new_BT
            return
        assert self.window is not None
        if self._pins is not None:
            place_BS, there_BS = self._pins
            row_B1 = torch.arange(len(new_BT), device=new_BT.device)[:, None]
            there = there_BS.view(*there_BS.shape, *[1] * (new_BT.dim() - 2))
            pinned_BS = kept_BS[:, : self.sinks]
            pinned_BS.copy_(torch.where(there, new_BT[row_B1, place_BS].to(kept_BS.dtype), pinned_BS))
        elif self.chunk.documents is None and start < self.sinks:
            pinned = min(stop, self.sinks)
            kept_BS[:, start:pinned] = new_BT[:, : pinned - start]
        first = max(start, self.sinks, stop - self.window)
        if first < stop:
            slot, newest_BT = self._slot(first), in_ring_BT[:, first - start :]
            before = min(stop - first, self.sinks + self.window - slot)
            kept_BS[:, slot : slot + before] = newest_BT[:, :before]
            if before < stop - first:
                kept_BS[:, self.sinks : self.sinks + stop - first - before] = newest_BT[:, before:]


class LayerCache:
    """Keys and values that one layer keeps; `KVCache` makes one for each.

    Attributes:
        tokens: of a row that the layer has read.
    """

    def __init__(self, slots: Slots, dtype: torch.dtype | None) -> None:
        self.slots, self.dtype = slots, dtype
        self.tokens = 0
        self.key_BSKD: Tensor | None = None
        self.value_BSKD: Tensor | None = None
        self.tails: dict[str, Tail] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values."""
        held = [tensor for tensor in (self.key_BSKD, self.value_BSKD) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def extend(self, key_BTKD: Tensor, value_BTKD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, K, D] that the chunk's tokens attend over, the chunk's own written.

        Raises:
            ValueError: where gradients are recorded, which would not flow through what is kept, for a chunk
                that the layer has read before or one after a chunk that it has not, and for keys of other
                sizes than those before.
        """
        check_no_gradients(key_BTKD, value_BTKD)
        self._check_goes_on(key_BTKD)
        dtype = key_BTKD.dtype if self.dtype is None else self.dtype
        key_BTKD, value_BTKD = as_kept(key_BTKD, self.dtype), as_kept(value_BTKD, self.dtype)
        self.key_BSKD, key_seen = self.slots.extend(self.key_BSKD, key_BTKD, dtype=dtype)
        self.value_BSKD, value_seen = self.slots.extend(self.value_BSKD, value_BTKD, dtype=dtype)
        self.tokens = self.slots.chunk.stop
        return key_seen, value_seen

    def before(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the tokens before the chunk, in their order and in this dtype; None at first."""
        key_BSKD, value_BSKD = self.slots.before(self.key_BSKD), self.slots.before(self.value_BSKD)
        if key_BSKD is None or value_BSKD is None:
            return None
        return key_BSKD.to(dtype), value_BSKD.to(dtype)

    def write(self, key_BTKD: Tensor, value_BTKD: Tensor) -> None:
        """Keep the chunk's keys and values, behind all that attended over them.

        Raises:
            ValueError: as `extend`.
        """
        self._check_goes_on(key_BTKD)
        dtype = key_BTKD.dtype if self.dtype is None else self.dtype
        self.key_BSKD = self.slots.write(self.key_BSKD, key_BTKD, dtype)
        self.value_BSKD = self.slots.write(self.value_BSKD, value_BTKD, dtype)
        self.tokens = self.slots.chunk.stop

    def replace(self, key_BSKD: Tensor, value_BSKD: Tensor) -> None:
        """Keep these in all slots; as `write`."""
        self._check_goes_on(key_BSKD)
        self.key_BSKD, self.value_BSKD = key_BSKD, value_BSKD
        self.tokens = self.slots.chunk.stop

    def _check_goes_on(self, key_BTKD: Tensor) -> None:
        start = self.slots.chunk.start
        if self.tokens != start:
            raise ValueError(
                f"the layer has read {self.tokens} tokens of the cache, and the chunk begins at {start}: "
                "call each layer once after each advance()"
            )
        if self.key_BSKD is not None:
            batch, _, *sizes = key_BTKD.shape
            rows, _, *kept = self.key_BSKD.shape
            if [batch, *sizes] != [rows, *kept]:
                raise ValueError(
                    f"the cache holds {rows} rows of {kept[0]} heads of {kept[1]}, the layer gives {batch} "
                    f"of {sizes[0]} of {sizes[1]}: give each layer its own entry, and as many rows"
                )

    def earlier(self, name: str, new_BT: Tensor, length: int) -> Tensor | None:
        """Up to `length` entries [B, E, ...] that came before the chunk's under this name; None at first."""
        return self.tails.setdefault(name, Tail(length)).exchange(new_BT)


class Tail:
    """The last few entries of a sequence that comes in chunks, for what reads some tokens back.

    Args:
        length: entries kept.

    Attributes:
        kept_BE: up to so many; None before the first.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.kept_BE: Tensor | None = None

    def copied(self) -> "Tail":
        """Another that holds the same."""
        other = Tail(self.length)
        other.kept_BE = self.kept_BE
        return other

    def exchange(self, new_BT: Tensor) -> Tensor | None:
        """Keep the last of the new entries [B, T, ...] and give those before them; None at first."""
        earlier_BE = self.kept_BE
        joined_BT = new_BT if earlier_BE is None else torch.cat([earlier_BE, new_BT], 1)
        self.kept_BE = joined_BT[:, max(joined_BT.shape[1] - self.length, 0) :].clone()
        return earlier_BE


class KVCache:
    """Keys and values of the tokens so far, for layers that read a text chunk by chunk.

    Whatever the chunks, the outputs are those of one call with the whole text. Call `advance` with each
    chunk, then each layer with its entry of `layers`, once. A cache in whose chunk a call failed is spent.
    `torch.compile` would make a graph for each number of tokens so far: `generation` compiles `StepCache`.

        cache = KVCache([layer.window_size for layer in layers], [layer.sinks for layer in layers])
        cache.advance(*hidden_BTD.shape[:2], hidden_BTD.device)
        for layer, kept in zip(layers, cache.layers):
            hidden_BTD = layer(hidden_BTD, cache=kept)

    A windowed layer holds `W + sinks` tokens from the first chunk on; a layer without a window grows by half
    when it is full. With a capacity of n all is allocated at once, `min(W + sinks, n)` tokens and n tokens.

    Args:
        windows: of each layer, None for all tokens.
        sinks: of each layer; None for none.
        capacity: tokens that a row may have, padding included; None for no limit.
        dtype: of the keys and values that are kept; None for the dtype that they come in. Positions are whole
            numbers in any case.

    Raises:
        ValueError: for a bad window, number of sinks, capacity or dtype, and not as many sinks as windows.
    """

    def __init__(
        self,
        windows: Sequence[int | None],
        sinks: Sequence[int] | None = None,
        *,
        capacity: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if capacity is not None and (
            isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1
        ):
            raise ValueError(
                f"capacity={capacity!r}: a whole number from 1 on or None is allowed; try capacity=4096"
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"dtype={dtype!r}: a floating-point dtype of torch or None is allowed; try dtype=None"
            )
        for name, of_layers in (("windows", windows), ("sinks", [0] if sinks is None else sinks)):
            if not isinstance(of_layers, Sequence) or isinstance(of_layers, str) or not of_layers:
                raise ValueError(f"{name}={of_layers!r}: a list with one for each layer is allowed")
        if sinks is not None and len(sinks) != len(windows):
            raise ValueError(f"{len(sinks)} sinks for {len(windows)} windows: give one for each layer")
        self.capacity = capacity
        kinds = list(zip(windows, [0] * len(windows) if sinks is None else sinks, strict=True))
        for layer, (window, of_layer) in enumerate(kinds):
            check_window(window, f"windows[{layer}]")
            check_sinks(of_layer, f"sinks[{layer}]")
        self.slots = {kind: Slots(*kind, capacity) for kind in kinds}
        self.layers = [LayerCache(self.slots[kind], dtype) for kind in kinds]
        self.tails: dict[str, Tail] = {}
        self.tokens = 0
        self._batch = 0
        # Of rows that differ, [B, 1]: the document that goes on and the column of its first token, the
        # document of the last token and the column where its run began.
        self._document_B1: Tensor | None = None
        self._start_B1: Tensor
        self._last_B1: Tensor
        self._run_B1: Tensor
        self._latest_start = 0

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values of all layers and rows."""
        return sum(layer.bytes_held for layer in self.layers)

    def earlier(self, name: str, new_BT: Tensor, length: int) -> Tensor | None:
        """Like `LayerCache.earlier`, for what belongs to no layer."""
        return self.tails.setdefault(name, Tail(length)).exchange(new_BT)

    def advance(
        self, batch: int, tokens: int, device: torch.device, documents_BT: Tensor | None = None
    ) -> Chunk:
        """Announce the next tokens of every row.

        Args:
            batch, tokens: B and T.
            device: of the layers.
            documents_BT: whole numbers [B, T], document of each token, -1 for padding. Without them the
                document of each row goes on; rows that differ need them in the first chunk.

        Returns:
            Where the tokens stand.

        Raises:
            ValueError: for no rows or tokens, another batch than before, more tokens than the capacity, a
                device that is none, or documents that are malformed, decrease, lie on another device, or come
                after a first chunk without them.
        """
        for name, size in (("batch", batch), ("tokens", tokens)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r}: a whole number from 1 on is allowed; try {name}=1")
        if not isinstance(device, torch.device):
            raise ValueError(f"device={device!r}: a torch.device is allowed; try device=torch.device('cpu')")
        start, stop = self.tokens, self.tokens + tokens
        if self.capacity is not None and stop > self.capacity:
            raise ValueError(
                f"{stop} tokens in a cache of capacity={self.capacity}; make one of capacity={stop} or more"
            )
        if start and batch != self._batch:
            raise ValueError(f"{batch} rows, and the cache holds {self._batch}: give as many")
        whole = None
        if documents_BT is not None:
            if not isinstance(documents_BT, Tensor) or documents_BT.dtype not in (torch.int32, torch.int64):
                kind = getattr(documents_BT, "dtype", type(documents_BT).__name__)
                raise ValueError(
                    f"documents_BT is {kind}: a tensor of whole numbers (int32 or int64) is allowed"
                )
            if start and self._document_B1 is None:
                raise ValueError("documents_BT: rows that differ need documents from the first chunk on")
            if documents_BT.shape != (batch, tokens):
                raise ValueError(
                    f"documents_BT has shape {tuple(documents_BT.shape)}: {(batch, tokens)} is allowed"
                )
            if documents_BT.device.type != device.type:
                raise ValueError(f"documents_BT is on {documents_BT.device}, device={device}: give both one")
            if documents_BT.dtype == torch.int64 and (documents_BT != documents_BT.int()).any():
                raise ValueError(
                    f"documents_BT holds numbers from {documents_BT.min()} to {documents_BT.max()}: a cache "
                    "keeps those below 2**31; count the documents from 0 on"
                )
            documents_BT = documents_BT.int()
        if start == 0:
            whole = Visibility.build(window=None, documents_BT=documents_BT)
        self._batch, self.tokens = batch, stop
        column_1T = torch.arange(start, stop, device=device)[None]
        if documents_BT is None and self._document_B1 is None:
            chunk = Chunk(start, stop, column_1T, column_1T, None, batch)
        else:
            chunk = self._place(start, column_1T, documents_BT, batch)
        for slots in self.slots.values():
            slots.advance(chunk, whole, self._pins(slots, chunk))
        return chunk

    def next_place(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Where the next token of each row stands if documents go on.

        Returns:
            Its column, int64 [1]; how many tokens directly before it are of its document, int64 [B or 1, 1];
            and, where rows differ, the column of its document's first token, int64 [B, 1], and the document,
            int32 [B, 1].
        """
        device = next(layer.key_BSKD.device for layer in self.layers if layer.key_BSKD is not None)
        column_1 = torch.full((1,), self.tokens, device=device)
        if self._document_B1 is None:
            return column_1, column_1[None].clone(), None, None
        run_B1 = torch.where(self._last_B1 == self._document_B1, self._run_B1, self.tokens)
        return column_1, column_1 - run_B1, self._start_B1.clone(), self._document_B1.clone()

    def _place(self, start: int, column_1T: Tensor, documents_BT: Tensor | None, batch: int) -> Chunk:
        stop = start + column_1T.shape[1]
        if self._document_B1 is None:
            self._document_B1 = column_1T.new_full((batch, 1), PADDING, dtype=torch.int32)
            self._last_B1 = torch.full_like(self._document_B1, NO_TOKEN)
            self._start_B1 = self._run_B1 = column_1T.new_zeros(batch, 1)
        if documents_BT is None:
            documents_BT = self._document_B1.expand(-1, column_1T.shape[1])
            start_BT = self._start_B1.expand_as(documents_BT)
            self._run_B1 = torch.where(self._last_B1 == self._document_B1, self._run_B1, start)
            run_BT = self._run_B1
            self._last_B1 = self._document_B1
        else:
            # One column of what came before stands in front; what begins there goes on.
            with_before_BT = torch.cat([self._document_B1, documents_BT], 1)
            if start:
                Visibility.build(window=None, documents_BT=with_before_BT)
            first_BT = document_starts(with_before_BT)[:, 1:]
            start_BT = torch.where(first_BT == 0, self._start_B1, first_BT + start - 1)
            run_first_BT = run_starts(torch.cat([self._last_B1, documents_BT], 1))[:, 1:]
            run_BT = torch.where(run_first_BT == 0, self._run_B1, run_first_BT + start - 1)
            self._document_B1 = with_before_BT.amax(1, keepdim=True)
            self._last_B1 = documents_BT[:, -1:]
            self._start_B1, self._run_B1 = start_BT[:, -1:], run_BT[:, -1:]
            self._latest_start = int(self._start_B1.max())
        return Chunk(start, stop, column_1T - start_BT, column_1T - run_BT, documents_BT, batch)

    def _pins(self, slots: Slots, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """Where the sinks of the documents that go on stand in the chunk; None where none does."""
        alike = chunk.documents is None
        if alike or not (slots.rolls and slots.sinks) or chunk.start >= self._latest_start + slots.sinks:
            return None
        column_BS = self._start_B1 + torch.arange(slots.sinks, device=self._start_B1.device)
        there_BS = (column_BS >= chunk.start) & (column_BS < chunk.stop)
        return (column_BS - chunk.start).clamp(0, chunk.tokens - 1), there_BS
