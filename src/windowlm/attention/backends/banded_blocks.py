"""Any device's way over a band with sinks: a block of queries, its keys and its sinks become a row.

The keys of neighbouring blocks overlap and are copied; `blockwise` computes the rows. `banded_matmul` does
the same on the CPU without copies; this is its slow twin, and serves sinks of packed documents.

Shapes: B batch, T queries, S keys, H query heads, K key-value heads, D head dimension,
N blocks, Q queries a block, L keys in reach of a block, A sinks.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..document_layout import PADDING
from ..window import Places, Visibility, reach
from . import blockwise
from .scaled_dot_product import Scoring

SMALLEST_BLOCK = 128


def attend(
    query_BTHD: Tensor,
    key_BSKD: Tensor,
    value_BSKD: Tensor,
    visibility: Visibility,
    scoring: Scoring,
) -> Tensor:
    """Attention where the keys are in order; returns [B, T, H, D]."""
    batch, queries = query_BTHD.shape[:2]
    bands = _Bands.fit(visibility, queries, key_BSKD.shape[1])
    cuts = visibility.once(
        "bands",
        lambda: bands.cuts(visibility, batch, query_BTHD.device),
        sizes=(batch, bands, query_BTHD.device),
    )
    tensors = (
        bands.of_queries(query_BTHD),
        bands.of_keys(key_BSKD, cuts.sinks),
        bands.of_keys(value_BSKD, cuts.sinks),
    )
    output = blockwise.attend(*tensors, visibility, scoring, cuts.places)
    return rearrange(output, "(b n) q h d -> b (n q) h d", b=batch)[:, :queries]


class _Cuts(NamedTuple):
    """`places` of queries [(B N), Q] and keys [(B N), L + A], and the key indices `sinks` [B, (N A)]."""

    places: Places
    sinks: Tensor | None


@dataclass(frozen=True)
class _Bands:
    """Cuts the queries into `count` blocks and gives each the `length` keys in reach of its queries."""

    queries: int
    keys: int
    block: int
    count: int
    behind: int
    ahead: int

    @classmethod
    def fit(cls, visibility: Visibility, queries: int, keys: int) -> Self:
        assert visibility.window is not None
        behind, ahead = reach(visibility.window, visibility.causal)
        # A quarter of the window: a quarter more work than needed, and each key is held five times.
        block = max(SMALLEST_BLOCK, visibility.window // 4 // 64 * 64)
        # A compiled graph would be bound to fewer queries than a block.
        block = block if torch.compiler.is_compiling() else min(block, queries)
        return cls(queries, keys, block, -(-queries // block), behind, ahead)

    @property
    def length(self) -> int:
        return self.behind + self.block + self.ahead

    def of_queries(self, heads_BTHD: Tensor, padding: float = 0.0) -> Tensor:
        padded = F.pad(heads_BTHD, (0, 0, 0, 0, 0, self.count * self.block - self.queries), value=padding)
        return rearrange(padded, "b (n q) h d -> (b n) q h d", q=self.block)

    def of_keys(self, heads_BSKD: Tensor, sinks: Tensor | None) -> Tensor:
        band = rearrange(
            self._slide(heads_BSKD.flatten(2), 0.0), "b n (k d) l -> (b n) l k d", k=heads_BSKD.shape[2]
        )
        if sinks is None:
            return band
        index = sinks.expand(heads_BSKD.shape[0], -1)[:, :, None, None].expand(-1, -1, *heads_BSKD.shape[2:])
        extra = rearrange(heads_BSKD.gather(1, index), "b (n a) k d -> (b n) a k d", n=self.count)
        return torch.cat([band, extra], dim=1)

    def _slide(self, tokens_BSC: Tensor, padding: float) -> Tensor:
        """The keys in reach of each block, [B, N, C, L]."""
        front = self.behind - (self.keys - self.queries)
        back = self.count * self.block - self.queries + self.ahead
        return F.pad(tokens_BSC, (0, 0, front, back), value=padding).unfold(1, self.length, self.block)

    def cuts(self, visibility: Visibility, batch: int, device: torch.device) -> _Cuts:
        places = visibility.places(self.queries, self.keys, device)
        documents = places.key_documents
        if documents is None:
            documents = torch.zeros_like(places.key_positions)
        key_positions = self._slide(places.key_positions[..., None], 0)[:, :, 0]
        key_documents = self._slide(documents[..., None], PADDING)[:, :, 0]
        sinks = None
        if visibility.sinks:
            sink_BNA, sink_documents = self._sinks(
                places.key_positions, documents, min(visibility.sinks, self.keys)
            )
            sinks = sink_BNA.flatten(1)
            key_positions = torch.cat(
                [key_positions, places.key_positions.gather(1, sinks).view_as(sink_BNA)], -1
            )
            key_documents = torch.cat([key_documents, sink_documents], -1)
        in_bands = (
            self._queries(places.query_positions, 0),
            key_positions,
            self._queries(documents[:, self.keys - self.queries :], PADDING),
            key_documents,
        )
        return _Cuts(Places(*(tensor.expand(batch, -1, -1).flatten(0, 1) for tensor in in_bands)), sinks)

    def _queries(self, tokens_BT: Tensor, padding: int) -> Tensor:
        padded = F.pad(tokens_BT, (0, self.count * self.block - self.queries), value=padding)
        return rearrange(padded, "b (n q) -> b n q", q=self.block)

    def _sinks(self, positions_BS: Tensor, documents_BS: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
        """Index and document [B, N, A] of the sinks before each band; PADDING hides those that are not.

        Only one document can have sinks there: the one that reaches across the band's start.
        """
        index_S = torch.arange(self.keys, device=positions_BS.device)
        start_N = torch.arange(self.count, device=positions_BS.device) * self.block
        start_N = start_N + self.keys - self.queries - self.behind
        latest_BS = torch.where(documents_BS != PADDING, index_S, -1).cummax(1).values
        before_BN = latest_BS[:, start_N.clamp(0)].clamp(0)
        first_BN = before_BN - positions_BS.gather(1, before_BN)
        sink_BNA = first_BN[..., None] + torch.arange(sinks, device=positions_BS.device)
        before_band = (sink_BNA >= 0) & (sink_BNA < start_N[:, None])
        sink_BNA = sink_BNA.clamp(0, self.keys - 1)
        document_BNA = documents_BS.gather(1, sink_BNA.flatten(1)).view_as(sink_BNA)
        return sink_BNA, torch.where(before_band, document_BNA, PADDING)
