import itertools

import pytest
import torch

from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.decoder import Decoder
from windowlm.model.ngram_embedding import HASH_PRIME, NgramEmbedding, multipliers_of


def built(vocabulary_size: int = 7, **settings: object) -> NgramEmbedding:
    torch.manual_seed(0)
    layer = NgramEmbedding(NgramEmbeddingsConfig(**settings), vocabulary_size, 12)  # type: ignore[arg-type]
    return layer.double()


def slow_twin(
    layer: NgramEmbedding, orders: list[int], vocabulary_size: int, text: list[int]
) -> torch.Tensor:
    """One document, one token and one order at a time, with Python's own whole numbers."""
    sums = []
    for place in range(len(text)):
        found = torch.zeros(layer.tables.embedding_dim, dtype=torch.float64)
        for number, order in enumerate(orders):
            if place + 1 < order:
                continue
            ngram = text[place + 1 - order : place + 1]
            multipliers = multipliers_of(order, vocabulary_size, layer.buckets)
            summed = sum(m * token for m, token in zip(multipliers, ngram, strict=True)) % HASH_PRIME
            row = summed * (summed + 1) % HASH_PRIME % layer.buckets
            found = found + layer.tables.weight[number * layer.buckets + row]
        sums.append(found if layer.projection is None else layer.projection.weight @ found)
    return torch.stack(sums)


@pytest.mark.parametrize("orders", [[2], [3, 2], [2, 4, 7]])
@pytest.mark.parametrize("dim", [None, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 20])
def test_sums_and_gradients_are_those_of_the_slow_twin(
    orders: list[int], dim: int | None, length: int
) -> None:
    layer = built(300, orders=orders, buckets=97, dim=dim)
    lengths = [length, 1, 4]
    texts = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    behind_BT = torch.cat([torch.arange(n) for n in lengths])[None]
    weights = list(layer.parameters())
    fast_TD = layer(torch.cat(texts)[None], behind_BT)[0]
    slow_TD = torch.cat([slow_twin(layer, orders, 300, text.tolist()) for text in texts])
    assert torch.allclose(fast_TD, slow_TD)
    if not slow_TD.requires_grad:
        return
    push_TD = torch.randn(fast_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for fast, slow in zip(
        torch.autograd.grad(fast_TD, weights, push_TD),
        torch.autograd.grad(slow_TD, weights, push_TD),
        strict=True,
    ):
        assert torch.allclose(fast, slow)


def test_every_ngram_has_a_row_of_its_own_where_there_are_enough() -> None:
    layer = built(7, orders=[2, 3], buckets=7**3)
    for order in (2, 3):
        rows = {int(layer.rows(torch.tensor([ngram]))[0, -1, order - 2]) for ngram in ngrams(7, order)}
        assert len(rows) == 7**order


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("buckets", [8192, 4999])
def test_ngrams_share_rows_as_seldom_as_chance_would_have_it(order: int, buckets: int) -> None:
    layer = built(256, orders=[order], buckets=buckets)
    drawn_NT = torch.randint(97, 123, (20_000, order), generator=torch.Generator().manual_seed(0)).unique(
        dim=0
    )
    counts = layer.rows(drawn_NT)[:, -1, 0].bincount(minlength=buckets).double()
    expected = len(drawn_NT) / buckets
    # Of a fair hash the mean of these squares is 1.
    assert ((counts - expected) ** 2 / expected).mean() < 1.1


def test_ngrams_that_share_a_row_in_one_order_do_not_in_the_next() -> None:
    layer = built(256, orders=[2, 3], buckets=64)
    texts_NT = torch.tensor(list(itertools.product([97], range(97, 123), range(97, 123))))
    rows_NO = layer.rows(texts_NT)[:, -1]
    same_NN = (rows_NO[:, None] == rows_NO[None]).double()
    both, first, second = (
        (part.sum() - len(texts_NT)) / (part.numel() - len(texts_NT))
        for part in (same_NN.prod(-1), same_NN[..., 0], same_NN[..., 1])
    )
    assert both < 3 * first * second


def test_a_text_may_be_read_from_the_middle_with_the_tokens_before_it() -> None:
    layer = built(50, orders=[2, 4], buckets=31)
    text_BT = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    positions_1T = torch.arange(12)[None]
    whole_BTD = layer(text_BT, positions_1T)
    for start in range(1, 12):
        for earlier in (3, 5):
            before_BE = text_BT[:, max(start - earlier, 0) : start]
            part_BTD = layer(text_BT[:, start:], positions_1T[:, start:], before_BE)
            assert torch.equal(part_BTD, whole_BTD[:, start:])


def test_saved_weights_keep_their_rows() -> None:
    assert multipliers_of(3, 256, 8192) == [1703223317, 637627973, 1779617531]
    assert multipliers_of(2, 256, 65536) == [256, 1]


def test_the_tables_start_without_a_say() -> None:
    shape = {"layers": 1, "dim": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "feed_forward_dim": 8}
    for dim in (None, 4):
        model = Decoder(ModelConfig(**shape, ngram_embeddings=NgramEmbeddingsConfig(dim=dim)), 20)  # type: ignore[arg-type]
        assert model.ngram_embedding is not None
        assert not model.ngram_embedding.tables.weight.any()
        if model.ngram_embedding.projection is not None:
            assert 0.3 < model.ngram_embedding.projection.weight.std() < 0.7


def ngrams(vocabulary_size: int, order: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(vocabulary_size), repeat=order))
