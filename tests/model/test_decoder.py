import pytest
import torch
import torch.nn.functional as F

from windowlm.attention.config import RotaryConfig
from windowlm.attention.layers import SlidingWindowAttention
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


def test_with_sinks_a_token_reaches_the_receptive_field_and_the_first_tokens() -> None:
    model = small(window=[4, 7], attention_sinks=3).double()
    embedded_BTD = model.embedding(tokens(1, 30)).detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded_BTD)
    model(tokens(1, 30))[0, -1].sum().backward()
    assert embedded_BTD.grad is not None
    seen = embedded_BTD.grad[0].abs().sum(-1) > 0
    assert seen.nonzero().flatten().tolist() == [0, 1, 2, *range(20, 30)]


OPTIONS: dict[str, object] = {
    "attention_sinks": 2,
    "learned_sinks": True,
    "output_gate": True,
    "logit_cap": 1.5,
    "rotary": [RotaryConfig(base=100.0), None],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_the_output(name: str) -> None:
    plain, changed = small(), small(**{name: OPTIONS[name]})
    with torch.no_grad():
        before_BTV, after_BTV = plain(tokens(1, 20)), changed(tokens(1, 20))
    assert not torch.allclose(before_BTV, after_BTV, atol=1e-4)
    assert before_BTV[0, 0].allclose(after_BTV[0, 0], atol=1e-5) is (
        name not in ("learned_sinks", "output_gate")
    )


@pytest.mark.parametrize("names", [[name] for name in OPTIONS] + [list(OPTIONS)])
def test_the_layers_are_those_that_a_hand_builds(names: list[str]) -> None:
    options = {name: OPTIONS[name] for name in names}
    model = small(layers=4, window=[5, None, 3], **options)
    layers = []
    windows, rotaries = (5, None, 3, 5), options.get("rotary", [RotaryConfig()]) * 4  # type: ignore[operator]
    for block, window, rotary in zip(model.blocks, windows, rotaries, strict=False):
        layer = SlidingWindowAttention(
            32,
            4,
            8,
            window,
            0.0,
            kv_heads=2,
            qk_norm=True,
            rotary=rotary,
            sinks=options.get("attention_sinks", 0),  # type: ignore[arg-type]
            learned_sinks="learned_sinks" in names,
            gate="output_gate" in names,
            logit_cap=options.get("logit_cap"),  # type: ignore[arg-type]
            backend="reference",
        )
        for parameter in block.attention.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        layer.load_state_dict(block.attention.state_dict())
        layers.append(layer)
    tokens_BT, documents_BT = tokens(1, 24), torch.tensor([[0] * 15 + [1] * 9], dtype=torch.int32)
    hidden_BTD = model.embedding(tokens_BT)
    for block, layer in zip(model.blocks, layers, strict=True):
        visibility = Visibility.build(window=layer.window_size, sinks=layer.sinks, documents_BT=documents_BT)
        hidden_BTD = hidden_BTD + layer(block.attention_norm(hidden_BTD), visibility=visibility)
        hidden_BTD = hidden_BTD + block.feed_forward(block.feed_forward_norm(hidden_BTD))
    expected_BTD = model.final_norm(hidden_BTD)
    assert torch.allclose(model.hidden(tokens_BT, documents_BT), expected_BTD, atol=1e-5)


def test_gradients_reach_the_parameters_of_the_options() -> None:
    model = small(**OPTIONS)
    F.cross_entropy(model(tokens(2, 20)).flatten(0, 1), tokens(2, 20).flatten()).backward()
    for block in model.blocks:
        assert block.attention.gate.weight.grad.abs().min() > 0
        assert block.attention.sink_logits.grad.abs().min() > 0


def test_sinks_are_those_of_each_document() -> None:
    model = small(window=3, attention_sinks=2)
    first_T, second_T = tokens(2, 12)
    documents_BT = torch.tensor([[0] * 12 + [1] * 12], dtype=torch.int32)
    with torch.no_grad():
        packed = model(torch.cat([first_T, second_T])[None], documents_BT)[:, 12:]
        assert torch.allclose(packed, model(second_T[None]), atol=1e-5)


def test_full_layers_ask_for_no_sinks() -> None:
    model = small(window=[4, None], attention_sinks=2)
    assert [block.attention.sinks for block in model.blocks] == [2, 0]


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
        hidden_BTD = block(hidden_BTD, Visibility.build(window=window, documents_BT=documents_BT))
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


def test_visibilities_made_before_take_the_place_of_documents_and_positions() -> None:
    model = small(layers=2, window=[4, None])
    tokens_BT, documents_BT = tokens(1, 20), torch.tensor([[0] * 12 + [1] * 8], dtype=torch.int32)
    positions_BT = torch.cat([torch.arange(12), torch.arange(8)])[None]
    made = model.visibilities(documents_BT, positions_BT)
    assert torch.equal(model(tokens_BT, visibilities=made), model(tokens_BT, documents_BT, positions_BT))
    with pytest.raises(ValueError, match="visibilities beside documents_BT"):
        model(tokens_BT, documents_BT, visibilities=made)


def test_each_layer_reads_its_mix_of_the_stream_and_the_normalised_embedding() -> None:
    model = small(layers=3, window=None, embedding_residual=True)
    tokens_BT = tokens(2, 12)
    shares = [(0.5, 2.0), (1.5, -1.0), (-0.3, 0.1)]
    hidden_BTD = model.embedding(tokens_BT)
    embedded_BTD = hidden_BTD / (hidden_BTD.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for block, (own, embedded) in zip(model.blocks, shares, strict=True):
        with torch.no_grad():
            block.residual_shares.copy_(torch.tensor([own, embedded]))
        hidden_BTD = own * hidden_BTD + embedded * embedded_BTD
        hidden_BTD = hidden_BTD + block.attention(block.attention_norm(hidden_BTD))
        hidden_BTD = hidden_BTD + block.feed_forward(block.feed_forward_norm(hidden_BTD))
    assert torch.allclose(model.hidden(tokens_BT), model.final_norm(hidden_BTD), atol=1e-5)
