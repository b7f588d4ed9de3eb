import pytest
import torch
import torch.nn.functional as F

from windowlm.attention.window import Visibility
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder

VOCABULARY = 61


def small(**changes: object) -> Decoder:
    torch.manual_seed(0)
    settings = {
        "layers": 2,
        "dim": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "feed_forward_dim": 48,
        "window": 5,
    }
    return Decoder(ModelConfig(**{**settings, **changes}), VOCABULARY).eval()  # type: ignore[arg-type]


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def test_logits_have_a_row_for_each_token() -> None:
    assert small()(tokens(2, 17)).shape == (2, 17, VOCABULARY)


@pytest.mark.parametrize("window", [1, 5, 100, None, [3, None]])
def test_editing_the_last_token_leaves_earlier_logits_bit_identical(window: object) -> None:
    model = small(window=window)
    before_BT = tokens(2, 40)
    after_BT = before_BT.clone()
    after_BT[:, -1] = (after_BT[:, -1] + 1) % VOCABULARY
    with torch.no_grad():
        assert torch.equal(model(before_BT)[:, :-1], model(after_BT)[:, :-1])
        assert not torch.equal(model(before_BT)[:, -1], model(after_BT)[:, -1])


def test_a_token_reaches_exactly_the_receptive_field() -> None:
    model = small(window=[4, 7]).double()
    embedded_BTD = model.embedding(tokens(1, 30)).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded_BTD)
    model(tokens(1, 30))[0, -1].sum().backward()
    assert embedded_BTD.grad is not None
    seen = embedded_BTD.grad[0].abs().sum(-1) > 0
    assert int(seen.sum()) == 1 + 3 + 6
    assert bool(seen[-10:].all())


def test_packed_documents_do_not_see_each_other() -> None:
    model = small(window=None)
    first_T, second_T, other_T = tokens(3, 12)
    documents_BT = torch.tensor([[0] * 12 + [1] * 12], dtype=torch.int32)
    positions_BT = torch.arange(12).repeat(2)[None]
    with torch.no_grad():
        one = model(torch.cat([first_T, second_T])[None], documents_BT, positions_BT)
        two = model(torch.cat([other_T, second_T])[None], documents_BT, positions_BT)
        alone = model(second_T[None])
    assert torch.equal(one[:, 12:], two[:, 12:])
    assert torch.allclose(one[:, 12:], alone, atol=1e-5)


def test_two_rows_equal_two_single_rows() -> None:
    model = small()
    rows_BT = tokens(2, 33)
    with torch.no_grad():
        together = model(rows_BT)
        apart = torch.cat([model(row_BT[None]) for row_BT in rows_BT])
    assert torch.allclose(together, apart, atol=1e-6)


def test_positions_are_counted_when_only_documents_are_given() -> None:
    model = small(window=None)
    rows_BT = tokens(1, 20)
    documents_BT = torch.tensor([[0] * 8 + [1] * 12], dtype=torch.int32)
    positions_BT = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        assert torch.allclose(
            model(rows_BT, documents_BT), model(rows_BT, documents_BT, positions_BT), atol=1e-5
        )


def test_documents_are_checked_once_and_seen_through_the_window_of_each_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small(layers=3, window=[4, None, 9])
    tokens_BT, documents_BT = tokens(1, 20), torch.tensor([[0] * 12 + [1] * 8], dtype=torch.int32)
    hidden_BTD = model.embedding(tokens_BT)
    for block, window in zip(model.blocks, (4, None, 9), strict=True):
        hidden_BTD = block(hidden_BTD, Visibility.build(window=window, documents_BT=documents_BT), None)
    expected_BTD = model.final_norm(hidden_BTD)

    built, build = [], Visibility.build
    monkeypatch.setattr(Visibility, "build", lambda **given: built.append(given) or build(**given))
    assert torch.equal(model.hidden(tokens_BT, documents_BT), expected_BTD)
    assert len(built) == 1


def test_tied_embeddings_share_one_matrix() -> None:
    tied, untied = small(), small(tied_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


def test_thirty_steps_learn_a_short_text_by_heart() -> None:
    model = small().train()
    text_BT = tokens(1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(text_BT[:, :-1]).flatten(0, 1), text_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.1
