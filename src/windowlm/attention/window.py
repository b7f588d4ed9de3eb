"""What a query may see: the one definition of the window, and the only file that computes a mask bound.

A window of W counts the keys a query may see, itself included. Key j is visible to query i iff
`0 <= i - j < W` (causal) or `|i - j| < W` (bidirectional); `None` is no window. W = 3 over six tokens:

    causal         bidirectional
    1 0 0 0 0 0    1 1 1 0 0 0
    1 1 0 0 0 0    1 1 1 1 0 0
    1 1 1 0 0 0    1 1 1 1 1 0
    0 1 1 1 0 0    0 1 1 1 1 1
    0 0 1 1 1 0    0 0 1 1 1 1
    0 0 0 1 1 1    0 0 0 1 1 1

Shapes: B batch, T queries, S keys; a leading 1 stands for any batch.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from .config import shown
from .dense_tensor import check_dense
from .document_layout import (
    PADDING,
    Layout,
    Runs,
    check_lowest,
    checked_runs,
    document_ends,
    document_starts,
    opens_run,
    positions_in_documents,
    run_starts,
)

OFFSETS_MULTIPLE = 64
# Longer than any sequence, and the sum of two still fits the 32 bits in which kernels count.
LONGEST_REACH = 2**30
RUNS = "runs"  # by which they are kept
Prepared = TypeVar("Prepared")
Key = TypeVar("Key")


def check_window(window: object, name: str = "window") -> int | None:
    """Return the window if it is None or a whole number from 1 on.

    Raises:
        ValueError: for zero, negative numbers, fractions, booleans and anything else.
    """
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            f"{name}={shown(window)}: a whole number from 1 on (keys seen, the query's own included) "
            f"or null for no window is allowed; try {name}=512"
        )
    return window


def narrowed(window: int | None, limit: int | None) -> int | None:
    """The window, or the limit where that is smaller; no window stays none."""
    return window if window is None or limit is None else min(window, limit)


def check_sinks(sinks: object, name: str = "sinks") -> None:
    """Raise ValueError unless the number of sinks is a whole number from 0 on."""
    if isinstance(sinks, bool) or not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"{name}={shown(sinks)}: a whole number from 0 on is allowed; try {name}=4")


def check_causal(causal: object) -> None:
    """Raise ValueError unless it is True or False."""
    if not isinstance(causal, bool):
        raise ValueError(f"causal={causal!r}: True or False is allowed; try causal=True")


def within_window(distance: Tensor, window: int | None, causal: bool) -> Tensor:
    """Whether a key at `distance = query position - key position` lies in the window (bool, same shape)."""
    # A Python number may be larger than any distance, and than what a tensor can be compared with.
    window = narrowed(window, torch.iinfo(distance.dtype).max)
    if causal:
        visible = distance >= 0
        return visible if window is None else visible & (distance < window)
    return torch.ones_like(distance, dtype=torch.bool) if window is None else distance.abs() < window


def reach(window: int, causal: bool) -> tuple[int, int]:
    """How many keys behind and ahead of itself a query sees; also the `window_size` tuple of flash-attn."""
    behind = min(window - 1, LONGEST_REACH)
    return behind, 0 if causal else behind


def visible_pairs(length: int, window: int | None) -> int:
    """Query-key pairs that a causal window shows in one document of `length` tokens."""
    full = length if window is None else min(window, length)
    return full * (full + 1) // 2 + (length - full) * full


def receptive_field(windows: Sequence[int | None]) -> int | None:
    """Tokens that can influence an output of stacked layers, `1 + sum(W - 1)`; None where one sees all."""
    reach_of_all = 1
    for window in windows:
        if window is None:
            return None
        reach_of_all += window - 1
    return reach_of_all


def outside_inference_mode(prepare: Callable[[], Prepared]) -> Prepared:
    """What `prepare` makes, of tensors that training may use too: those of inference mode it must not."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return prepare()
    with torch.inference_mode(False):
        return prepare()


Finish = Callable[[Tensor, Tensor | None], Tensor]  # of attention's output, see `Visibility.attend`


def unfinished(output_BTHD: Tensor, _: Tensor | None) -> Tensor:
    """The output as it is."""
    return output_BTHD


class Places(NamedTuple):
    """Where queries and keys stand: position within the document, and the document (None: all the same)."""

    query_positions: Tensor
    key_positions: Tensor
    query_documents: Tensor | None
    key_documents: Tensor | None


class Bounds(NamedTuple):
    """What queries see, and keys are seen by, as ranges of indices; int32, [B or 1, ...].

    A key is visible iff it lies from the query's first to its last key and the query is not beyond the
    key's last query: the latter hides padding between tokens of one document.

    Attributes:
        first_keys, last_keys: [B, T], the first and the last key in each query's reach. Where it sees
            nothing, the first is S and the last is -1.
        last_queries: [B, S], place among the keys of the last query that sees each key; -1 where none does.
        gaps: [], how many tokens of padding stand inside a document; where there are none, the queries'
            ranges alone say what is visible.
    """

    first_keys: Tensor
    last_keys: Tensor
    last_queries: Tensor
    gaps: Tensor

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Bounds":
        """The same with each tensor moved."""
        return Bounds(*map(move, self))


class Segments(NamedTuple):
    """Runs of tokens of one document, or of padding, in the rows laid end to end, for packed kernels.

    Attributes:
        offsets: int32, where each run starts, then the number of tokens, repeated so that the length is a
            multiple of `OFFSETS_MULTIPLE` and shapes recur.
        extent: [longest, 0], without numbers: its length is what `longest` says. As a size it is a symbol to
            torch.compile, which takes a number for a constant until it has seen another.
        real: bool [B, T], False for padding; None where there is none.
    """

    offsets: Tensor
    extent: Tensor
    real: Tensor | None

    @property
    def longest(self) -> int:
        """A power of two that no run exceeds, so that few values recur."""
        return self.extent.shape[0]

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Segments":
        """The same with each tensor moved, of lengths for which torch.compile makes one graph."""
        from torch._dynamo import maybe_mark_dynamic  # takes a second, and most callers do not compile

        moved = Segments(
            move(self.offsets), move(self.extent), None if self.real is None else move(self.real)
        )
        for tensor in (moved.offsets, moved.extent):
            maybe_mark_dynamic(tensor, 0)
        return moved


@dataclass(frozen=True, eq=False)
class Visibility:
    """What each query of a batch may see; build it once a batch and share it over layers of one window.

    A key is visible iff it is within the window (or at one of the positions 0 to `sinks - 1`), in
    the query's document, not padding and, if `causal`, not in the future. Positions decide, not indices.
    A window of 2 over six tokens, rows are queries: documents of four and two tokens; the same with one sink;
    one document, of which the last two tokens are queries.

        1 0 0 0 0 0    1 0 0 0 0 0
        1 1 0 0 0 0    1 1 0 0 0 0
        0 1 1 0 0 0    1 1 1 0 0 0
        0 0 1 1 0 0    1 0 1 1 0 0
        0 0 0 0 1 0    0 0 0 0 1 0    0 0 0 1 1 0
        0 0 0 0 1 1    0 0 0 0 1 1    0 0 0 0 1 1

    Create it with `Visibility.build`, which checks its arguments. It keeps the tensors and what it makes of
    them: for others build another, and do not write into these.

    Attributes:
        window: keys a query may see, itself included; None for no window.
        causal: whether keys of later positions are hidden.
        sinks: how many first tokens of a document stay visible to all of it.
        positions: [B, T], place of each query in its document; None: from the documents or the order.
        documents: whole numbers [B, T], document of each query, -1 for padding; None: one, no padding.
        key_positions, key_documents: [B, S], the same for keys that are not the queries' own tokens
            (a cache). Without them the queries are the last T of the S keys.
        layout: how the documents lie; None without documents, with separate keys, on the meta device, and
            where the visibility was built inside a compiled graph.
    """

    window: int | None = None
    causal: bool = True
    sinks: int = 0
    positions: Tensor | None = None
    documents: Tensor | None = None
    key_positions: Tensor | None = None
    key_documents: Tensor | None = None
    layout: Layout | None = None
    _of_window: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    _of_documents: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the numbers; `build` checks the tensors."""
        check_window(self.window)
        check_causal(self.causal)
        check_sinks(self.sinks)

    @classmethod
    def build(
        cls,
        *,
        window: int | None,
        causal: bool = True,
        sinks: int = 0,
        documents_BT: Tensor | None = None,
        positions_BT: Tensor | None = None,
        mask_BT: Tensor | None = None,
        key_documents_BS: Tensor | None = None,
        key_positions_BS: Tensor | None = None,
    ) -> Self:
        """Check the arguments and combine `mask_BT` (bool, True = token) with the documents.

        The values of tensors are checked too, except inside a compiled graph and on the meta device.

        Raises:
            ValueError: for a bad window or sinks, wrong ranks, shapes, dtypes or devices, tensors that
                torch.func.vmap maps, documents of queries whose numbers decrease; and, where keys have no
                positions of their own, positions that do not advance with the tokens of their document,
                and such below 0 beside sinks.
        """
        if mask_BT is not None:
            _check_matrix("mask_BT", mask_BT, torch.bool)
            if documents_BT is None:
                documents_BT = torch.zeros_like(mask_BT, dtype=torch.int32)
            _check_matrix("documents_BT", documents_BT, torch.int32, torch.int64)
            _check_same_shape("documents_BT", documents_BT, "mask_BT", mask_BT)
            documents_BT = documents_BT.masked_fill(~mask_BT, PADDING)
        for name, tensor in (
            ("documents_BT", documents_BT),
            ("positions_BT", positions_BT),
            ("key_documents_BS", key_documents_BS),
            ("key_positions_BS", key_positions_BS),
        ):
            if tensor is not None:
                _check_matrix(name, tensor, torch.int32, torch.int64)
                if not tensor.shape[0]:
                    raise ValueError(f"{name} has no rows: one is allowed, or as many as the batch has")
        if positions_BT is not None and documents_BT is not None:
            _check_same_shape("positions_BT", positions_BT, "documents_BT", documents_BT)
        if key_positions_BS is None and key_documents_BS is not None:
            raise ValueError("key_documents_BS without key_positions_BS: give the keys' positions too")
        if key_positions_BS is not None:
            if positions_BT is None:
                raise ValueError("key_positions_BS without positions_BT: give the queries' positions too")
            if (documents_BT is None) != (key_documents_BS is None):
                raise ValueError("documents_BT and key_documents_BS: give both or neither")
            if key_documents_BS is not None:
                _check_same_shape("key_documents_BS", key_documents_BS, "key_positions_BS", key_positions_BS)
            rows = positions_BT.shape[0], key_positions_BS.shape[0]
            if rows[0] != rows[1] and 1 not in rows:
                raise ValueError(
                    f"key_positions_BS has {rows[1]} rows, positions_BT {rows[0]}: "
                    "give as many, or one for all"
                )
            _check_same_device("key_positions_BS", key_positions_BS, "positions_BT", positions_BT)
        documents_BT, positions_BT, key_documents_BS, key_positions_BS = map(
            _for_training,
            # The distance of two positions may not fit into 32 bits.
            (documents_BT, _long(positions_BT), key_documents_BS, _long(key_positions_BS)),
        )
        layout: Layout | None = None
        known: dict[Hashable, Any] = {}
        if not torch.compiler.is_compiling():
            found = _inspect(documents_BT, None if key_positions_BS is not None else positions_BT, sinks)
            if key_positions_BS is None and documents_BT is not None and found is not None:
                known[RUNS], layout = found
            if key_documents_BS is not None and key_documents_BS.numel() and not key_documents_BS.is_meta:
                check_lowest("key_documents_BS", int(key_documents_BS.min()))
        return cls(
            window,
            causal,
            sinks,
            positions_BT,
            documents_BT,
            key_positions_BS,
            key_documents_BS,
            layout,
            _of_documents=known,
        )

    def with_window(self, window: int | None) -> Self:
        """The same documents and positions seen through another window, without checking them again.

        Raises:
            ValueError: for a bad window.
        """
        return replace(self, window=window, _of_window={})

    def prepare(self, batch: int) -> Self:
        """Make now what kernels read of the documents of `batch` rows, such as on the CPU; returns self.

        Raises:
            ValueError: for a number of rows below 1, and documents of more or fewer rows that are not one.
        """
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch={batch!r}: a whole number from 1 on is allowed; try batch=1")
        if self.documents is not None and not self.separate_keys:
            rows = self.documents.shape[0]
            # Not `in`: torch.compile of 2.11 takes a number for unequal to its symbol.
            if rows != 1 and rows != batch:
                raise ValueError(f"batch={batch}: documents_BT has {rows} rows; try batch={rows}")
            tokens, device = self.documents.shape[1], self.documents.device
            if not self.sinks:
                self.bounds(tokens, tokens, device)
            if self.layout is not None and not self.layout.gaps:
                self.segments(batch, tokens, device)
        return self

    def in_one_graph(self, *, computed_again: bool) -> bool:
        """Whether a compiled graph can hold attention with it, of which the backward pass may compute parts
        again.
        """
        return True

    def send(self, key_BTKD: Tensor, value_BTKD: Tensor) -> Any:
        """Begin to send them to other processes whose queries see them, for `attend` to wait for; None where
        `attend` does all of it.
        """
        return None

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
        **options: Any,
    ) -> Tensor:
        """Attention of a layer's queries over the keys of the same tokens, and what `finish` makes of it.

        A visibility of tokens whose window reaches others that stand elsewhere overrides it, fetches them,
        and may finish some queries after the others.

        Args:
            attention: computes it, as `dispatch.attention`.
            query_BTHD, key_BTKD, value_BTKD: as of that.
            sent: what `send` gave for these keys and values.
            finish: takes the output of some tokens, [B, t, H, D], and what `finish_with` says of the same.
            finish_with: of all tokens, [B, T, ...].
            options: of `attention`.
        """
        return finish(attention(query_BTHD, key_BTKD, value_BTKD, self, **options), finish_with)

    def earlier(self, channels_BTF: Tensor, count: int) -> Tensor | None:
        """Channels of the `count` tokens before the first, [B, count, ...]; None where there are none."""
        return None

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Self:
        """The same on another device, with what was prepared of it."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking), {})

    def pin_memory(self) -> Self:
        """The same in memory from which a GPU copies while the host goes on; torch's DataLoader calls it."""
        return self._moved(lambda tensor: tensor.pin_memory(), {})

    def _moved(self, move: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Self:
        """`memo` holds what was moved before, by the identity of what it was, as that of `copy.deepcopy`."""

        def moved(tensor: Tensor) -> Tensor:
            if id(tensor) not in memo:
                memo[id(tensor)] = outside_inference_mode(lambda: move(tensor))
            result: Tensor = memo[id(tensor)]
            return result

        def moved_if_there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else moved(tensor)

        def all_moved(prepared: dict[Hashable, Any]) -> dict[Hashable, Any]:
            """Ranges and segments; the rest is made anew."""
            kept: dict[Hashable, Any] = {}
            for name, made in prepared.items():
                if isinstance(made, Bounds | Segments) and isinstance(name, tuple):
                    there = made.moved(moved)
                    # Where rows or documents do not tell the device, the name does.
                    device = there[0].device
                    kept[tuple(device if isinstance(part, torch.device) else part for part in name)] = there
            return kept

        if id(self._of_documents) not in memo:
            memo[id(self._of_documents)] = all_moved(self._of_documents)
        return replace(
            self,
            positions=moved_if_there(self.positions),
            documents=moved_if_there(self.documents),
            key_positions=moved_if_there(self.key_positions),
            key_documents=moved_if_there(self.key_documents),
            _of_window=all_moved(self._of_window),
            _of_documents=memo[id(self._of_documents)],
        )

    @property
    def separate_keys(self) -> bool:
        """Whether the keys carry positions of their own and may stand in any order."""
        return self.key_positions is not None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How many keys behind and ahead of itself a query sees, None for all; flash-attn's `window_size`."""
        if self.window is None:
            return None, 0 if self.causal else None
        return reach(self.window, self.causal)

    def covers(self, keys: int) -> bool:
        """Whether the window hides none of so many keys, so that attention is full."""
        return self.window is None or self.window >= keys

    def once(
        self,
        name: Hashable,
        prepare: Callable[[], Prepared],
        *,
        sizes: tuple[Hashable, ...] = (),
        any_window: bool = False,
    ) -> Prepared:
        """Return what `prepare` made when first called under this name: work done once a batch.

        `sizes` are those of the call that the result depends on and the documents do not tell. With
        `any_window` it is shared with other windows over the same documents.
        """
        if torch.compiler.is_compiling() and sizes:
            # Looking for a size would bind the compiled graph to it.
            return prepare()
        prepared_before = self._of_documents if any_window else self._of_window
        name = (name, *sizes)
        if name in prepared_before:
            prepared: Prepared = prepared_before[name]
            return prepared
        made = outside_inference_mode(prepare)
        if not torch.compiler.is_compiling():
            prepared_before[name] = made
        return made

    def places(self, queries: int, keys: int, device: torch.device) -> Places:
        """Positions [B, T] and [B, S] and documents (or None) of queries and keys.

        Raises:
            ValueError: where the tensors' lengths are not those of the call, or there are fewer keys than
                queries and no positions of the keys to say where they stand.
        """
        self.check_call(None, queries, keys, device)
        told = self.documents is not None or self.positions is not None
        return self.once(
            "places",
            lambda: self._places(queries, keys, device),
            sizes=() if told else (queries, keys, device),
            any_window=True,
        )

    def check_call(self, batch: int | None, queries: int, keys: int, device: torch.device) -> None:
        """Raise ValueError where the tensors do not describe a call of this shape (None: any batch)."""
        for name, tensor, length in (
            ("documents_BT", self.documents, queries),
            ("positions_BT", self.positions, queries),
            ("key_positions_BS", self.key_positions, keys),
            ("key_documents_BS", self.key_documents, keys),
        ):
            if tensor is not None and tensor.shape[1] != length:
                raise ValueError(
                    f"{name} has length {tensor.shape[1]}, the call has {length}; give one a token"
                )
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device}, the call on {device}; move it with .to()")
            # Not `in`: torch.compile of 2.11 takes a number for unequal to its symbol.
            if tensor is not None and batch is not None and tensor.shape[0] != 1 and tensor.shape[0] != batch:
                raise ValueError(
                    f"{name} describes {tensor.shape[0]} rows, the call has {batch}; "
                    "give one a row, or one for all"
                )
        if self.key_positions is not None:
            return
        if self.documents is None and self.positions is None and keys < queries:
            raise ValueError(
                f"{keys} keys for {queries} queries: at least as many keys are allowed; "
                "give key_positions_BS to say where fewer keys stand"
            )
        if (self.documents is not None or self.positions is not None) and keys != queries:
            raise ValueError(
                f"{keys} keys for {queries} queries with documents or positions: "
                "give key_positions_BS (and key_documents_BS) to say where the keys stand"
            )

    def _places(self, queries: int, keys: int, device: torch.device) -> Places:
        if self.key_positions is not None:
            assert self.positions is not None
            return Places(self.positions, self.key_positions, self.documents, self.key_documents)
        if self.documents is None and self.positions is None:
            positions_1S = torch.arange(keys, device=device)[None]
            return Places(positions_1S[:, keys - queries :], positions_1S, None, None)
        positions_BT = self.positions
        if positions_BT is None:
            assert self.documents is not None
            positions_BT = positions_in_documents(self.documents)
        return Places(positions_BT, positions_BT, self.documents, self.documents)

    def bounds(self, queries: int, keys: int, device: torch.device) -> Bounds:
        """Ranges of what the window shows the last T of S tokens, sinks apart; prepared once a batch."""
        assert not self.separate_keys
        return self.once(
            "bounds",
            lambda: self._bounds(queries, keys, device),
            sizes=() if self.documents is not None else (queries, keys, device),
        )

    def _bounds(self, queries: int, keys: int, device: torch.device) -> Bounds:
        behind, ahead = (keys if side is None else side for side in self.reach)
        index_1S = torch.arange(keys, device=device, dtype=torch.int32)[None]
        documents_BT = self.documents
        if documents_BT is None:
            start, end = torch.zeros_like(index_1S), torch.full_like(index_1S, keys - 1)
            real_BS = torch.ones_like(index_1S, dtype=torch.bool)
            gaps = torch.zeros((), device=device, dtype=torch.int32)
        else:
            (start, end), real_BS = self._document_reach(), documents_BT != PADDING
            gaps = ((self._run_starts() != start) & real_BS).sum()
        first_BS = torch.where(real_BS, (index_1S - behind).clamp(min=start), keys)
        last_BS = torch.where(real_BS, (index_1S + ahead).clamp(max=end), -1)
        last_query_BS = torch.where(real_BS, (index_1S + behind).clamp(max=end), -1)
        return Bounds(
            first_BS[:, keys - queries :].int(),
            last_BS[:, keys - queries :].int(),
            last_query_BS.int(),
            gaps.int(),
        )

    def _runs(self) -> Runs | None:
        """Of the documents, where they were found as these were checked."""
        return None if torch.compiler.is_compiling() else self._of_documents.get(RUNS)

    def _document_reach(self) -> tuple[Tensor, Tensor]:
        """First and last token of each token's document, by index in its row; of no use for padding."""
        assert self.documents is not None
        runs = self._runs()
        if runs is None:
            return document_starts(self.documents), document_ends(self.documents)
        shape = self.documents.shape
        return runs.by_token(runs.first_tokens, shape), runs.by_token(runs.last_tokens, shape)

    def _run_starts(self) -> Tensor:
        """First token of each token's run, by index in its row."""
        assert self.documents is not None
        runs = self._runs()
        return (
            run_starts(self.documents) if runs is None else runs.by_token(runs.starts, self.documents.shape)
        )

    def sink_ranges(self, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and last sink that each of the last T of S tokens sees, as indices of keys, [B or 1, T].

        S and -1 where it sees none; padding in between is none.
        """
        places = self.places(queries, keys, device)
        index_1S = torch.arange(keys, device=device)[None]
        query_1T = index_1S[:, keys - queries :]
        start_BT, end_BT = torch.zeros_like(query_1T), torch.full_like(query_1T, keys - 1)
        real_BT = torch.ones_like(query_1T, dtype=torch.bool)
        if self.documents is not None:
            start_BT, end_BT = self._document_reach()
            real_BT = self.documents != PADDING
        # A document that is cut on the left starts at a later position.
        last_BT = query_1T - places.query_positions + (min(self.sinks, LONGEST_REACH) - 1)
        last_BT = last_BT.clamp(max=query_1T if self.causal else end_BT)
        seen_BT = real_BT & (last_BT >= start_BT)
        return torch.where(seen_BT, start_BT, keys), torch.where(seen_BT, last_BT, -1)

    def segments(self, batch: int, queries: int, device: torch.device) -> Segments:
        """Runs of the rows laid end to end, prepared once a batch; asks for documents without gaps."""
        told = self.documents is not None and self.documents.shape[0] == batch
        return self.once(
            "segments",
            lambda: self._segments(batch, queries, device),
            sizes=() if told else (batch, queries, device),
            any_window=True,
        )

    def _segments(self, batch: int, queries: int, device: torch.device) -> Segments:
        if self.documents is None:
            return Segments(
                torch.arange(0, (batch + 1) * queries, queries, device=device, dtype=torch.int32),
                torch.empty(queries, 0, device=device),
                None,
            )
        assert self.layout is not None
        assert not self.layout.gaps
        documents_BT = self.documents.expand(batch, -1)
        runs = self.layout.runs * (batch // self.documents.shape[0])
        places = -(-(runs + 1) // OFFSETS_MULTIPLE) * OFFSETS_MULTIPLE
        opens = opens_run(documents_BT).flatten()
        offsets = documents_BT.new_full((places,), opens.numel(), dtype=torch.int32)
        index = torch.arange(opens.numel(), device=device, dtype=torch.int32)
        # All others write where the last offset stands, which says the same.
        offsets.scatter_(
            0,
            torch.where(opens, opens.cumsum(0) - 1, places - 1),
            torch.where(opens, index, opens.numel()),
        )
        real_BT = documents_BT != PADDING if self.layout.padded else None
        longest = 1 << (self.layout.longest - 1).bit_length()
        return Segments(offsets, torch.empty(longest, 0, device=device), real_BT)

    def behind(self, tokens: int, device: torch.device) -> Tensor:
        """How many tokens directly before each are of its document, [B or 1, T]; prepared once a batch.

        Raises:
            ValueError: for keys with positions of their own, whose neighbours are not known.
        """
        if self.separate_keys:
            raise ValueError("key_positions_BS: what stands before a token is known of its own row alone")
        return self.once(
            "behind",
            lambda: self._behind(tokens, device),
            sizes=() if self.documents is not None else (tokens, device),
            any_window=True,
        )

    def _behind(self, tokens: int, device: torch.device) -> Tensor:
        index_1T = torch.arange(tokens, device=device)[None]
        return index_1T if self.documents is None else index_1T - self._run_starts()

    def between(self, places: Places) -> Tensor:
        """Whether each query sees each key of `places`, [..., T, S] from [..., T] and [..., S]; bool."""
        distance_BTS = places.query_positions[..., :, None] - places.key_positions[..., None, :]
        visible_BTS = within_window(distance_BTS, self.window, self.causal)
        if self.sinks:
            sink_BS = (places.key_positions >= 0) & (places.key_positions < min(self.sinks, LONGEST_REACH))
            visible_BTS = visible_BTS | (
                within_window(distance_BTS, None, self.causal) & sink_BS[..., None, :]
            )
        if places.query_documents is not None:
            assert places.key_documents is not None
            same_BTS = places.query_documents[..., :, None] == places.key_documents[..., None, :]
            visible_BTS = visible_BTS & same_BTS & (places.key_documents != PADDING)[..., None, :]
        return visible_BTS

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """The whole mask [B or 1, T, S], bool: for the reference, tests and pictures.

        Raises:
            ValueError: as `places`.
        """
        return self.between(self.places(queries, keys, device))


def move_together(
    visibilities: Mapping[Key, Visibility], move: Callable[[Tensor], Tensor]
) -> dict[Key, Visibility]:
    """Windows over the same documents, each tensor moved once and what they share still shared."""
    memo: dict[int, Any] = {}
    return {key: visibility._moved(move, memo) for key, visibility in visibilities.items()}


def _long(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.long()


def _for_training(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a copy of it where it was made in inference mode."""
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    return outside_inference_mode(tensor.clone)


def _inspect(
    documents_BT: Tensor | None, positions_BT: Tensor | None, sinks: int
) -> tuple[Runs, Layout] | None:
    """Check them, and find the runs; None where there is nothing to be read."""
    if documents_BT is None:
        if positions_BT is None:
            return None
        documents_BT = torch.zeros_like(positions_BT)
    if documents_BT.numel() == 0 or documents_BT.is_meta:
        return None
    return outside_inference_mode(lambda: checked_runs(documents_BT, positions_BT, sinks))


def _check_matrix(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    check_dense(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: two dimensions [batch, tokens] are allowed"
        )
    if torch._C._functorch.is_batchedtensor(tensor):
        raise ValueError(f"{name} is mapped by torch.func.vmap: build the visibility outside, once for all")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} has dtype {tensor.dtype}: {allowed} is allowed")


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, {other_name} {tuple(other.shape)}: give equal ones"
        )
    _check_same_device(name, tensor, other_name, other)


def _check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}: give one device")
