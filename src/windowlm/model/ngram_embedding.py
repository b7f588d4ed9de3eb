"""Hashed n-gram embeddings: what the last few tokens were, looked up instead of computed.

As in BLT (Pagnoni et al. 2024, arXiv:2412.09871, section 3.2.1). Of an order n, the token and the n - 1
before it in its document name a row of that order's table; all rows found are added to the token's embedding.
Where a document has no n - 1 tokens before, the order adds nothing.

Shape letters: B batch, T tokens, E earlier tokens, O orders, N the largest order, D model width, W width of
the tables.
"""

from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windowlm.model.config import NgramEmbeddingsConfig
from windowlm.model.look_up_table import LookUpTable

# A prime so small that a token times a multiplier below it, summed over an n-gram, stays within int64.
HASH_PRIME = 2**31 - 1
LARGEST_SUM = 2**63 // HASH_PRIME


class NgramEmbedding(nn.Module):
    """Sum of the embeddings of the n-grams that end at each token.

    With ``s = sum(multiplier * token) mod prime``, a multilinear hash (Carter and Wegman 1979), an n-gram's
    row is ``s * (s + 1) mod prime mod buckets``. Two n-grams share a row with a chance of about one in
    ``buckets``; the square keeps sums that lie on a grid, as those of short n-grams, from falling unevenly.
    Each order has multipliers of its own, so that sharing in one says nothing of the others. Where every
    n-gram of an order can have a row of its own, it has: the row is s.

    Args:
        config: orders, rows and width of the tables.
        vocabulary_size: of the tokens.
        dim: width of the model, D.
    """

    def __init__(self, config: NgramEmbeddingsConfig, vocabulary_size: int, dim: int) -> None:
        super().__init__()
        orders, longest = config.orders, max(config.orders)
        self.longest = longest
        assert vocabulary_size * longest <= LARGEST_SUM
        self.buckets = config.buckets
        # One look-up serves all orders: their tables stand one below the other.
        self.tables = LookUpTable(len(orders) * config.buckets, config.dim or dim)
        self.projection = nn.Linear(config.dim, dim, bias=False) if config.dim else None
        multipliers = [multipliers_of(order, vocabulary_size, config.buckets) for order in orders]
        # Buffers of integers keep their dtype under bf16-true.
        self.multipliers_ON = nn.Buffer(
            torch.tensor([[0] * (longest - len(row)) + row for row in multipliers]), persistent=False
        )
        self.orders_O = nn.Buffer(torch.tensor(orders), persistent=False)
        crowded = [not has_a_row_for_each(order, vocabulary_size, config.buckets) for order in orders]
        self.squared_O = nn.Buffer(torch.tensor(crowded), persistent=False)
        self.first_rows_O = nn.Buffer(torch.arange(len(orders)) * config.buckets, persistent=False)

    def forward(self, tokens_BT: Tensor, behind_BT: Tensor, earlier_BE: Tensor | None = None) -> Tensor:
        """What the n-grams add to the embedding of each token.

        Args:
            tokens_BT: token ids.
            behind_BT: how many tokens directly before each are of its document, [B or 1, T]: the position
                in the document, where it is complete.
            earlier_BE: tokens that stand before the first, where these are the end of a longer text.

        Returns:
            [B, T, D].
        """
        rows_BTO = self.rows(tokens_BT, earlier_BE)
        there_BTO1 = (behind_BT[..., None] >= self.orders_O - 1)[..., None]
        found_BTW: Tensor = torch.where(there_BTO1, self.tables(rows_BTO), 0.0).sum(-2)
        return found_BTW if self.projection is None else self.projection(found_BTW)

    def rows(self, tokens_BT: Tensor, earlier_BE: Tensor | None = None) -> Tensor:
        """Row of the tables that each order's n-gram has, int64 [B, T, O]; missing tokens count 0."""
        longest, tokens = self.multipliers_ON.shape[1], tokens_BT.shape[1]
        if earlier_BE is not None:
            tokens_BT = torch.cat([earlier_BE, tokens_BT], 1)
        tokens_BT = F.pad(tokens_BT.long(), (longest - 1, 0))
        ngrams_BTN = tokens_BT[:, tokens_BT.shape[1] - tokens - longest + 1 :].unfold(1, longest, 1)
        sums_BTO = (ngrams_BTN[:, :, None] * self.multipliers_ON).sum(-1) % HASH_PRIME
        hashed_BTO = sums_BTO * (sums_BTO * self.squared_O + 1) % HASH_PRIME
        return hashed_BTO % self.buckets + self.first_rows_O


def has_a_row_for_each(order: int, vocabulary_size: int, buckets: int) -> bool:
    """Whether the n-grams of an order need not share rows."""
    ngrams: int = vocabulary_size**order
    return ngrams <= buckets


def multipliers_of(order: int, vocabulary_size: int, buckets: int) -> list[int]:
    """What the tokens of an n-gram are multiplied by, the earliest first.

    Drawn from a hash of order and place, as saved weights belong to them; powers of the vocabulary's size
    where there is a row for each n-gram.
    """
    if has_a_row_for_each(order, vocabulary_size, buckets):
        return [vocabulary_size**place for place in reversed(range(order))]
    digests = [sha256(f"order {order}, place {place}".encode()).digest() for place in range(order)]
    return [1 + int.from_bytes(digest[:8], "big") % (HASH_PRIME - 1) for digest in digests]
