"""Attention of one process's part of a sequence that is cut over several: the halo exchange.

Each process holds L of the T tokens, not all of them as many. A layer of window W needs the keys and values
of up to W - 1 tokens before them, and of the sinks of the document that goes on in them; those alone travel,
from whoever owns them, be it several processes away. A layer without a window needs all of that document so
far. What is visible is said by `Visibility` of the whole sequence, and a part is a call with more keys than
queries.

The queries whose keys are all at hand are computed while the others' keys are on their way. In one compiled
graph all queries are one call, and what is computed of the queries before it overlaps.

Shapes: B batch, T tokens of the whole sequence, L own tokens, Q queries of a call and S its keys, R places
for tokens of others, H query heads, D head dimension.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from windowlm.attention.document_layout import PADDING
from windowlm.attention.window import Finish, Visibility, narrowed, unfinished
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.neighbour_exchange import NeighbourExchange, NeighboursTokens
from windowlm.parallel.token_exchange import TokenExchange


class Part(NamedTuple):
    """Some queries of a shard in one call of attention.

    Attributes:
        queries: how many.
        first_key: first own key that it reads.
        blank: queries to put in front, whose outputs are dropped: with documents, kernels take as many
            queries as keys.
        visibility: of the call.
    """

    queries: int
    first_key: int
    blank: int
    visibility: Visibility

    def attend(
        self, attention: Callable[..., Tensor], query_BQHD: Tensor, keys: tuple[Tensor, ...], **options: Any
    ) -> Tensor:
        """Attention of its queries over keys and values, which end with the last query's own."""
        if not self.blank:
            return attention(query_BQHD, *keys, self.visibility, **options)
        query_BQHD = torch.nn.functional.pad(query_BQHD, (0, 0, 0, 0, self.blank, 0))
        return attention(query_BQHD, *keys, self.visibility, **options)[:, self.blank :]


@dataclass(frozen=True, eq=False)
class ShardVisibility(Visibility):
    """What the queries of this process's part of a sequence may see, here and at other processes.

    Documents are those of the part's own tokens, positions what these are rotated by. Create it with
    `shard_visibilities`.

    Attributes:
        exchange: keys and values that travel.
        halo: the same for a graph that holds attention, where they are the last tokens before each part; else
            None.
        near: outside of such a graph the queries that see own keys alone; None where there are none.
        far: queries before them, which see others' keys too; None where there are none.
        own_behind: how many tokens directly before each are of its document, [B or 1, L].
        neighbours: how tokens travel for what reads so many tokens before its own, by their number.
    """

    exchange: TokenExchange | None = None
    halo: NeighbourExchange | None = None
    near: Part | None = None
    far: Part | None = None
    own_behind: Tensor | None = None
    neighbours: Mapping[int, TokenExchange] = field(default_factory=dict)

    def in_one_graph(self, *, computed_again: bool) -> bool:
        """As of `Visibility`: what is computed again each process's compiler would choose for itself, and an
        exchange needs all.
        """
        return self.halo is not None and not self.neighbours and not computed_again

    def send(self, key_BTKD: Tensor, value_BTKD: Tensor) -> NeighboursTokens | None:
        """Begin the exchange in a graph that is to hold `attend` as well; see `Visibility.send`."""
        if not torch.compiler.is_compiling() or not self.in_one_graph(computed_again=False):
            return None
        assert self.halo is not None
        return self.halo.send(key_BTKD, value_BTKD)

    def attend(
        self,
        attention: Callable[..., Tensor],
        query_BTHD: Tensor,
        key_BTKD: Tensor,
        value_BTKD: Tensor,
        *,
        sent: NeighboursTokens | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of the own queries over own keys and those of others; see `Visibility.attend`."""
        if sent is None:
            sent = self.send(key_BTKD, value_BTKD)
        if sent is not None:
            return self._attend_at_once(sent, attention, query_BTHD, key_BTKD, value_BTKD, **options)
        attended_BTD: Tensor = self._attend_outside_graphs(
            attention, query_BTHD, key_BTKD, value_BTKD, **options
        )
        return attended_BTD

    def _attend_at_once(
        self,
        sent: NeighboursTokens,
        attention: Callable[..., Tensor],
        query_BTHD: Tensor,
        *own_BTKD: Tensor,
        **options: Any,
    ) -> Tensor:
        """One call of all queries: in two, those that see others' keys do not fill a GPU."""
        assert self.halo is not None
        remote = self.halo.receive(own_BTKD, sent)
        seen = Visibility.build(window=self.window)
        if self.halo.received:
            key_BSKD, value_BSKD = (torch.cat(pair, 1) for pair in zip(remote, own_BTKD, strict=True))
            return seen.attend(attention, query_BTHD, key_BSKD, value_BSKD, **options)
        # The first process makes use of the none that it gets, for gradients to be sent back on the way.
        return seen.attend(attention, query_BTHD, *own_BTKD, **options) + sum(
            tensor.sum() for tensor in remote
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _attend_outside_graphs(
        self,
        attention: Callable[..., Tensor],
        query_BTHD: Tensor,
        key_BTKD: Tensor,
        value_BTKD: Tensor,
        *,
        finish: Finish = unfinished,
        finish_with: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        assert self.exchange is not None
        reaching = 0 if self.far is None else self.far.queries
        far_query, near_query = _cut(query_BTHD, reaching)
        far_finish, near_finish = _cut(finish_with, reaching)

        def finished(
            part: Part, query_BQHD: Tensor | None, keys: tuple[Tensor, ...], of_finish: Tensor | None
        ) -> Tensor:
            assert query_BQHD is not None
            # Joined before, attention's outputs would be kept twice for the backward pass.
            return finish(part.attend(attention, query_BQHD, keys, **options), of_finish)

        own, first, travelling = self.exchange.send(key_BTKD, value_BTKD, first=reaching)
        outputs = []
        if self.near is not None:
            keys = tuple(tensor[:, self.near.first_key :] for tensor in own)
            outputs.append(finished(self.near, near_query, keys, near_finish))
        remote = self.exchange.receive(own, travelling)
        if self.far is not None:
            keys = tuple(torch.cat(pair, 1) for pair in zip(remote, first, strict=True))
            outputs.insert(0, finished(self.far, far_query, keys, far_finish))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def earlier(self, channels_BTF: Tensor, count: int) -> Tensor | None:
        """Channels of the `count` tokens before the part, [B, count, ...]; zeros where they have no use."""
        exchange = self.neighbours[count]
        own, _, travelling = exchange.send(channels_BTF)
        return exchange.receive(own, travelling)[0]

    def behind(self, tokens: int, device: torch.device) -> Tensor:
        """How many tokens directly before each are of its document, others' tokens included; [B or 1, L]."""
        assert self.own_behind is not None
        return self.own_behind

    def with_window(self, window: int | None) -> Self:
        """Refused: what travels was planned for one window."""
        raise ValueError("a shard's visibility is planned for its window: build it with shard_visibilities")

    def prepare(self, batch: int) -> Self:
        """Make now what kernels read of the documents of `batch` rows, such as on the CPU; returns self."""
        for part in (self.near, self.far):
            if part is not None:
                part.visibility.prepare(batch)
        return self

    def _moved(self, move: Callable[[Tensor], Tensor], memo: dict[int, Any]) -> Self:
        def moved(exchange: TokenExchange) -> TokenExchange:
            if id(exchange) not in memo:
                memo[id(exchange)] = exchange.moved(move)
            found: TokenExchange = memo[id(exchange)]
            return found

        assert self.exchange is not None
        assert self.own_behind is not None
        if id(self.own_behind) not in memo:
            memo[id(self.own_behind)] = move(self.own_behind)
        near, far = (
            None if part is None else part._replace(visibility=part.visibility._moved(move, memo))
            for part in (self.near, self.far)
        )
        return replace(
            super()._moved(move, memo),
            exchange=moved(self.exchange),
            near=near,
            far=far,
            own_behind=memo[id(self.own_behind)],
            neighbours={count: moved(exchange) for count, exchange in self.neighbours.items()},
        )


def _cut(by_token_BT: Tensor | None, first: int) -> tuple[Tensor | None, Tensor | None]:
    """So many first tokens and those behind them; None where there are none."""
    if by_token_BT is None or first == 0:
        return None, by_token_BT
    behind = by_token_BT.shape[1] - first
    if behind == 0:
        return by_token_BT, None
    # Split, and not indexed: each index fills and adds a gradient of all tokens.
    first_Bt, behind_Bt = torch.split(by_token_BT, [first, behind], 1)
    return first_Bt, behind_Bt


def shard_visibilities(
    layers: Mapping[int | None, int],
    group: ContextGroup,
    batch: int,
    tokens: int,
    *,
    documents_BT: Tensor | None = None,
    positions_BT: Tensor | None = None,
    window_limit: int | None = None,
    earlier: tuple[int, ...] = (),
) -> dict[int | None, Visibility]:
    """What the layers of each window may see of a sequence that is cut over the group.

    Every process of the group calls it with the same arguments, on the CPU; nothing is sent.

    Args:
        layers: how many sinks the layers of each window have.
        group: who shares the sequence.
        batch: B.
        tokens: T, of the whole sequence.
        documents_BT, positions_BT: of the whole sequence, as `Visibility.build` takes them.
        window_limit: layers whose window is larger see only so many keys; None for no limit.
        earlier: how many tokens before its own each reader besides attention needs, such as a convolution.

    Raises:
        ValueError: as `ContextGroup.parts` and `Visibility.build`.
    """
    cuts = group.parts(tokens)
    own = cuts[group.rank]
    whole = Visibility.build(window=None, documents_BT=documents_BT, positions_BT=positions_BT)
    device = torch.device("cpu") if documents_BT is None else documents_BT.device
    # Without positions the rotation counts along the row, as on one process.
    counted_BT = torch.arange(tokens, device=device)[None] if positions_BT is None else positions_BT
    positions_BT = whole.places(tokens, tokens, device).query_positions
    shared: dict[Hashable, Any] = {}
    plans = {count: _plan(whole, group, batch, tokens, neighbours=count) for count in earlier}
    made: dict[int | None, Visibility] = {}
    for window, sinks in layers.items():
        seen = replace(whole.with_window(narrowed(window, window_limit)), sinks=sinks)
        plan = _plan(seen, group, batch, tokens)
        near, far = _parts(seen, plan, positions_BT, own, batch)
        made[window] = ShardVisibility(
            window=seen.window,
            sinks=sinks,
            positions=counted_BT[:, own],
            documents=None if seen.documents is None else seen.documents[:, own],
            exchange=plan.exchange,
            halo=_halo(seen, group, cuts),
            near=near,
            far=far,
            own_behind=whole.behind(tokens, device).expand(positions_BT.shape[0], -1)[:, own],
            neighbours={count: neighbour.exchange for count, neighbour in plans.items()},
            _of_documents=shared,
        )
    return made


def _halo(seen: Visibility, group: ContextGroup, cuts: list[slice]) -> NeighbourExchange | None:
    """For a window within rows of one document each, that reaches the process before and no further."""
    chosen = seen.documents is not None or seen.positions is not None or seen.sinks
    least = min(cut.stop - cut.start for cut in cuts)
    if group.size == 1 or chosen or seen.window is None or not 1 < seen.window <= least + 1:
        return None
    return NeighbourExchange.of(group, seen.window - 1)


class Needed(NamedTuple):
    """Tokens before a part that its queries see, for each row.

    Attributes:
        halo: first token of those directly before the part; its start where there are none.
        sinks: first and last of those that are sinks of the document that goes on in it; none where the last
            is before the first.
    """

    halo: list[int]
    sinks: list[tuple[int, int]]


class Plan(NamedTuple):
    """What travels for one window, and where it stands at this process.

    Attributes:
        exchange: what is sent and received.
        sources: [B or 1, R], token of the whole sequence that stands in each place; -1 where there is none.
        first_seen: [B or 1, L], first token that each own query sees, T where it sees none.
    """

    exchange: TokenExchange
    sources: Tensor
    first_seen: Tensor


def _plan(
    seen: Visibility, group: ContextGroup, batch: int, tokens: int, *, neighbours: int | None = None
) -> Plan:
    """Plan the exchange of what the queries see, or of so many neighbours directly before each part."""
    cuts = group.parts(tokens)
    own = cuts[group.rank]
    starts = [cut.start for cut in cuts]
    device = torch.device("cpu") if seen.documents is None else seen.documents.device
    first_keys_BT = first_BT = seen.bounds(tokens, tokens, device).first_keys.long()
    sinks = None
    if seen.sinks:
        sinks = seen.sink_ranges(tokens, tokens, device)
        first_BT = first_BT.minimum(sinks[0])
    rows = first_BT.shape[0]
    if neighbours is None:
        halo_NB = _first_in_parts(first_keys_BT.expand(rows, -1), cuts)
    else:
        # A run of padding has neighbours as a document has.
        starts_N = torch.tensor(starts)
        behind_BN = seen.behind(tokens, device).expand(rows, -1)[:, starts_N].clamp(max=neighbours)
        halo_NB = (starts_N - behind_BN).T.tolist()
    parts = [
        Needed(
            [min(first, cut.start) for first in of_cut],
            [(0, -1)] * rows if sinks is None else _sinks_before(sinks, cut),
        )
        for cut, of_cut in zip(cuts, halo_NB, strict=True)
    ]
    travels_BT = torch.ones((rows, tokens), dtype=torch.bool)
    if seen.documents is not None and neighbours is None:
        travels_BT = seen.documents != PADDING

    def wanted(part: int, row: int) -> Tensor:
        """Tokens before the part that it needs of a row, in order."""
        needed = parts[part]
        first, (first_sink, last_sink) = needed.halo[row], needed.sinks[row]
        span = torch.cat(
            [
                torch.arange(first_sink, max(min(last_sink + 1, first), first_sink)),
                torch.arange(first, starts[part]),
            ]
        )
        return span[travels_BT[row, span]]

    def owned(part: int, row: int, owner: int) -> Tensor:
        span = wanted(part, row)
        return span[(span >= starts[owner]) & (span < cuts[owner].stop)]

    of_row = [row if rows > 1 else 0 for row in range(batch)]
    mine = [wanted(group.rank, row) for row in range(rows)]
    halo = max(own.start - first for first in parts[group.rank].halo) if neighbours is None else neighbours
    far_sinks = [int((span < own.start - halo).sum()) for span in mine]
    room = max(far_sinks) if neighbours is None else 0

    def place(row: int, span: Tensor) -> Tensor:
        """Where tokens stand among the R: by their distance, the sinks before them side by side."""
        number = torch.searchsorted(mine[row], span)
        return torch.where(
            span >= own.start - halo, span - own.start + halo + room, number + room - far_sinks[row]
        )

    sources_BR = torch.full((rows, room + halo), -1)
    for row, span in enumerate(mine):
        sources_BR[row, place(row, span)] = span
    sent, received = [], []
    sent_tokens, received_places = [], []
    for other in range(group.size):
        leaving = [
            owned(other, of_row[row], group.rank) - own.start + row * (own.stop - own.start)
            for row in range(batch)
        ]
        coming = [owned(group.rank, of_row[row], other) for row in range(batch)]
        sent_tokens += leaving
        received_places += [place(of_row[row], span) + row * (room + halo) for row, span in enumerate(coming)]
        sent.append(sum(map(len, leaving)))
        received.append(sum(map(len, coming)))
    exchange = TokenExchange(
        group,
        batch,
        room + halo,
        torch.cat(sent_tokens),
        sent,
        torch.cat(received_places),
        received,
        idle=not any(len(wanted(part, row)) for part in range(group.size) for row in range(rows)),
    )
    return Plan(exchange, sources_BR, first_BT[:, own])


def _first_in_parts(first_BT: Tensor, cuts: list[slice]) -> list[list[int]]:
    """The least of each part of each row, by part."""
    return [first_BT[:, cut].amin(1).tolist() for cut in cuts]


def _sinks_before(sinks: tuple[Tensor, Tensor], cut: slice) -> list[tuple[int, int]]:
    """First and last sink before a part that its queries see, by row."""
    start = cut.start
    first_BL, last_BL = (bound[:, cut].long() for bound in sinks)
    before_BL = first_BL < start
    first_B = torch.where(before_BL, first_BL, start).amin(1)
    last_B = torch.where(before_BL, last_BL, -1).amax(1).clamp(max=start - 1)
    return [
        (first, last) if last >= first else (0, -1)
        for first, last in zip(first_B.tolist(), last_B.tolist(), strict=True)
    ]


def _parts(
    seen: Visibility, plan: Plan, positions_BT: Tensor, own: slice, batch: int
) -> tuple[Part | None, Part | None]:
    """The calls of attention: queries that see own keys alone, and those before them."""
    length = own.stop - own.start
    first_BL = plan.first_seen
    reaching = (first_BL < own.start).any(0).nonzero()
    end = int(reaching[-1]) + 1 if len(reaching) else 0
    near = far = None
    if end < length:
        least = int(first_BL[:, end:].min()) - own.start
        sources_T = torch.arange(own.start + min(least, end), own.stop)
        near = _part(seen, sources_T[None], positions_BT, (end, length), min(least, end), own)
    if end:
        own_T = torch.arange(own.start, own.start + end).expand(plan.sources.shape[0], -1)
        far = _part(seen, torch.cat([plan.sources, own_T], 1), positions_BT, (0, end), 0, own)
    return near, far


def _part(
    seen: Visibility,
    sources_BS: Tensor,
    positions_BT: Tensor,
    queries: tuple[int, int],
    first_key: int,
    own: slice,
) -> Part:
    """One call: its keys are the tokens `sources_BS` of the whole sequence, -1 where there is none."""
    first, end = queries
    more = sources_BS.shape[1] - (end - first)
    here = slice(own.start + first, own.start + end)
    rows = max(positions_BT.shape[0], sources_BS.shape[0])
    sources_BS = sources_BS.expand(rows, -1)
    there_BS = sources_BS >= 0
    documents_BS = None
    if seen.documents is not None:
        found_BS = seen.documents.expand(rows, -1).gather(1, sources_BS.clamp(min=0))
        documents_BS = torch.where(there_BS, found_BS, PADDING)
        of_one_B = (documents_BS == documents_BS[:, :1]).all(1) & (documents_BS[:, 0] != PADDING)
        if not seen.sinks and bool(of_one_B.all()):
            # Documents hide nothing, and nothing need be computed in vain for keys before the queries.
            documents_BS = None
    if seen.sinks:
        visibility = Visibility.build(
            window=seen.window,
            sinks=seen.sinks,
            positions_BT=positions_BT[:, here],
            documents_BT=None if seen.documents is None else seen.documents[:, here],
            key_positions_BS=positions_BT.expand(rows, -1).gather(1, sources_BS.clamp(min=0)),
            key_documents_BS=documents_BS,
        )
        return Part(end - first, first_key, 0, visibility)
    if documents_BS is None:
        return Part(end - first, first_key, 0, Visibility.build(window=seen.window))
    visibility = Visibility.build(window=seen.window, documents_BT=documents_BS)
    return Part(end - first, first_key, more, visibility)
