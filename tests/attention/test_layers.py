"""The layer: the interface it keeps, its options, and that only the past is seen."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import EagerAndRecordGraphs

import windowlm.attention
from windowlm import FlashAttention, SlidingWindowAttention
from windowlm.attention.config import RotaryConfig
from windowlm.attention.window import Visibility


def test_the_usage_of_the_original_repository_runs() -> None:
    attn = SlidingWindowAttention(dim=512, heads=8, dim_head=64, window_size=512, dropout=0.1)
    assert attn(torch.randn(1, 1024, 512)).shape == (1, 1024, 512)


def test_short_sequences_are_exactly_full_attention() -> None:
    torch.manual_seed(0)
    windowed = SlidingWindowAttention(32, 4, 8, window_size=50, dropout=0.0, kv_heads=2)
    full = FlashAttention(32, 4, 8, kv_heads=2)
    full.load_state_dict(windowed.state_dict())
    hidden_BTD = torch.randn(2, 50, 32)
    assert torch.equal(windowed(hidden_BTD), full(hidden_BTD))


@pytest.mark.parametrize("window", [7, None])
def test_editing_the_last_token_leaves_earlier_outputs_bit_identical(window: int | None) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(32, 4, 8, window, dropout=0.0, qk_norm=True)
    hidden_BTD = torch.randn(2, 40, 32)
    edited_BTD = hidden_BTD.clone()
    edited_BTD[:, -1] += 1
    before, after = layer(hidden_BTD), layer(edited_BTD)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_the_bidirectional_layer_sees_both_sides() -> None:
    layer = SlidingWindowAttention(16, 2, 8, window_size=3, dropout=0.0, causal=False)
    hidden_BTD = torch.randn(1, 12, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(hidden_BTD)[0, 5].sum(), hidden_BTD)
    assert (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]


def test_a_narrower_visibility_makes_the_layer_one_of_that_window() -> None:
    hidden_BTD = torch.randn(2, 12, 16)
    wide, narrow = (SlidingWindowAttention(16, 2, 8, window, dropout=0.0) for window in (5, 3))
    narrow.load_state_dict(wide.state_dict())
    shown = wide(hidden_BTD, visibility=Visibility.build(window=3))
    assert torch.equal(shown, narrow(hidden_BTD))
    with pytest.raises(ValueError, match="visibility has window=3"):
        SlidingWindowAttention(16, 2, 8, None)(hidden_BTD, visibility=Visibility.build(window=3))


@pytest.mark.parametrize("window", [5, None])
def test_padding_changes_nothing_and_gives_zeros(window: int | None) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, 2, 8, window, dropout=0.0)
    hidden_BTD = torch.randn(1, 12, 16)
    mask = torch.tensor([[True] * 12 + [False] * 4])
    padded = layer(torch.cat([hidden_BTD, torch.randn(1, 4, 16)], 1), mask=mask)
    torch.testing.assert_close(padded[:, :12], layer(hidden_BTD))
    assert (padded[:, 12:] == 0).all()
    left = layer(torch.cat([torch.randn(1, 4, 16), hidden_BTD], 1), mask=mask.flip(1))
    torch.testing.assert_close(left[:, 4:], layer(hidden_BTD))


@pytest.mark.parametrize("window", [5, None])
def test_a_packed_document_equals_itself_alone(window: int | None) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, 2, 8, window, dropout=0.0)
    hidden_BTD = torch.randn(1, 30, 16)
    documents_BT = (torch.arange(30) >= 11).int()[None]
    positions_BT = torch.cat([torch.arange(11), torch.arange(19)])[None]
    visibility = Visibility.build(window=window, documents_BT=documents_BT, positions_BT=positions_BT)
    packed = layer(hidden_BTD, visibility=visibility)
    torch.testing.assert_close(packed[:, :11], layer(hidden_BTD[:, :11]))
    torch.testing.assert_close(packed[:, 11:], layer(hidden_BTD[:, 11:]))


def test_dropout_acts_in_training_only() -> None:
    layer = SlidingWindowAttention(16, 2, 8, 5, dropout=0.5)
    hidden_BTD = torch.randn(1, 12, 16)
    assert not torch.equal(layer(hidden_BTD), layer(hidden_BTD))
    layer.eval()
    assert torch.equal(layer(hidden_BTD), layer(hidden_BTD))


def test_without_rotation_order_beyond_the_mask_does_not_matter() -> None:
    layer = SlidingWindowAttention(16, 2, 8, None, dropout=0.0, causal=False, rotary=None)
    hidden_BTD = torch.randn(1, 12, 16)
    order = torch.randperm(12)
    torch.testing.assert_close(layer(hidden_BTD)[:, order], layer(hidden_BTD[:, order]))


def test_the_rotation_follows_the_positions_given() -> None:
    layer = SlidingWindowAttention(16, 2, 8, None, dropout=0.0, rotary=RotaryConfig(base=500.0))
    hidden_BTD = torch.randn(1, 12, 16)
    shifted = layer(hidden_BTD, positions_BT=torch.arange(12)[None] + 1000)
    torch.testing.assert_close(shifted, layer(hidden_BTD), atol=1e-5, rtol=1e-4)
    stretched = layer(hidden_BTD, positions_BT=torch.arange(12)[None] * 3)
    assert not torch.allclose(stretched, layer(hidden_BTD), atol=1e-3)


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("given", ["nothing", "mask", "visibility", "positions_BT"])
def test_the_layer_compiles_into_one_graph(window: int | None, given: str) -> None:
    layer = SlidingWindowAttention(16, 2, 8, window, dropout=0.0, qk_norm=True)
    hidden_BTD = torch.randn(1, 70, 16)
    mask = torch.arange(70)[None] < 60
    options = {
        "nothing": None,
        "mask": mask,
        "visibility": Visibility.build(window=window, mask_BT=mask),
        "positions_BT": torch.arange(70)[None] + 3,
    }
    keywords = {} if given == "nothing" else {given: options[given]}
    expected = layer(hidden_BTD, **keywords)
    expected.sum().backward()
    gradient = layer.key.weight.grad.clone()
    layer.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden_BTD, **keywords)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(layer.key.weight.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"sinks": 1, "logit_cap": 5.0}], ids=str)
@pytest.mark.parametrize("window", [5, 60, None])
def test_a_graph_without_autocast_switches_none_off(window: int | None, options: dict[str, Any]) -> None:
    """Torch keeps no such graph on disk."""
    if window is None:
        options = {name: value for name, value in options.items() if name != "sinks"}
    layer = SlidingWindowAttention(16, 2, 8, window, dropout=0.0, **options)
    recorded = EagerAndRecordGraphs()
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend=recorded)(torch.randn(1, 70, 16))
    (graph,) = recorded.graphs
    assert not [node.target for node in graph.graph.nodes if "autocast" in str(node.target)]


ALL_OPTIONS = {
    "sinks": 2,
    "learned_sinks": True,
    "gate": True,
    "logit_cap": 5.0,
    "qk_norm": True,
    "short_convolution": 3,
}


@pytest.mark.parametrize("window", [5, None])
def test_the_layer_with_all_options_compiles_into_one_graph_and_equals_the_reference(
    window: int | None,
) -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, 4, 8, window, dropout=0.0, kv_heads=2, **ALL_OPTIONS)
    torch.nn.init.normal_(layer.sink_logits)
    for convolution in layer.convolutions.values():
        torch.nn.init.normal_(convolution.weight_CHD)
    hidden_BTD = torch.randn(1, 40, 16)
    torch._dynamo.reset()
    results = []
    for run, backend in (
        (layer, "auto"),
        (torch.compile(layer, fullgraph=True, backend="aot_eager"), "auto"),
        (layer, "reference"),
    ):
        layer.zero_grad()
        layer.backend = backend
        output = run(hidden_BTD)
        output.sum().backward()
        results.append({"output": output} | {name: weight.grad for name, weight in layer.named_parameters()})
    for name, exact in results[2].items():
        for got in (results[0][name], results[1][name]):
            torch.testing.assert_close(got, exact, atol=1e-5, rtol=1e-4, msg=name)


def test_options_that_are_off_add_no_parameters() -> None:
    names = {name for name, _ in SlidingWindowAttention(16, 2, 8).named_parameters()}
    assert names == {"query.weight", "key.weight", "value.weight", "output.weight"}


def test_sinks_stay_visible_to_all() -> None:
    layer = SlidingWindowAttention(16, 2, 8, window_size=3, dropout=0.0, sinks=2)
    hidden_BTD = torch.randn(1, 12, 16, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(hidden_BTD)[0, 9].sum(), hidden_BTD)
    assert (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == [0, 1, 7, 8, 9]


def test_a_learned_sink_takes_weight_and_a_low_one_takes_none() -> None:
    layer = SlidingWindowAttention(16, 2, 8, 4, dropout=0.0, learned_sinks=True)
    plain = SlidingWindowAttention(16, 2, 8, 4, dropout=0.0)
    plain.load_state_dict(layer.state_dict(), strict=False)
    hidden_BTD = torch.randn(1, 9, 16)
    assert not torch.allclose(layer(hidden_BTD), plain(hidden_BTD), atol=1e-3)
    torch.nn.init.constant_(layer.sink_logits, -100.0)
    torch.testing.assert_close(layer(hidden_BTD), plain(hidden_BTD))
    torch.nn.init.constant_(layer.sink_logits, 1e4)
    output = layer(hidden_BTD)
    assert (output == 0).all()
    output.sum().backward()
    assert layer.sink_logits.grad.isfinite().all()


def test_the_gate_scales_each_head_by_a_sigmoid_of_the_hidden_state() -> None:
    layer = SlidingWindowAttention(16, 2, 8, 4, dropout=0.0, gate=True)
    plain = SlidingWindowAttention(16, 2, 8, 4, dropout=0.0)
    plain.load_state_dict(layer.state_dict(), strict=False)
    hidden_BTD = torch.randn(1, 9, 16)
    torch.nn.init.zeros_(layer.gate.weight)
    torch.testing.assert_close(layer(hidden_BTD), plain(hidden_BTD) / 2)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_layer_runs_under_autocast_and_in_low_and_double_precision(qk_norm: bool) -> None:
    layer = SlidingWindowAttention(16, 2, 8, 5, dropout=0.0, qk_norm=qk_norm)
    hidden_BTD = torch.randn(1, 12, 16)
    expected = layer(hidden_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer(hidden_BTD)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), expected, atol=0.02, rtol=0.05)
    mixed.sum().backward()
    torch.testing.assert_close(layer.double()(hidden_BTD.double()).float(), expected)
    low = layer.bfloat16()(hidden_BTD.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"heads": 0}, "heads=0"),
        ({"heads": 10**30}, "heads=1000"),
        ({"window_size": True}, "window_size=True"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dim_head": 7}, "an even number"),
        ({"dim_head": 1}, "dim_head=1: an even number is allowed with rotary positions"),
        ({"dim_head": 15}, "dim_head=15: .* try dim_head=16 or rotary=None"),
        ({"kv_heads": 0, "heads": 4}, "kv_heads=0: .* try kv_heads=4"),
        ({"dim_head": 10**5000}, "dim_head=a whole number of many digits: "),
        ({"dropout": False}, "dropout=False"),
        ({"sinks": -1}, "sinks=-1"),
        ({"logit_cap": 0.0}, "logit_cap=0.0"),
        ({"dropout": "0.1"}, "dropout='0.1'"),
        ({"causal": "yes"}, "causal='yes'"),
        ({"backend": "flush"}, "backend='flush'"),
        ({"rotary": "llama3"}, "rotary='llama3'"),
        ({"kv_heads": 1.0}, r"kv_heads=1\.0"),
        ({"qk_norm": "yes"}, "qk_norm='yes': True or False"),
        ({"qkv_bias": 1}, "qkv_bias=1: True or False"),
        ({"learned_sinks": 2}, "learned_sinks=2: True or False"),
        ({"gate": None}, "gate=None: True or False"),
        ({"value_embedding": 1}, "value_embedding=1: True or False"),
        ({"qk_norm_epsilon": "1e-6"}, "qk_norm_epsilon='1e-6': a finite number from 0 on"),
        ({"qk_norm_epsilon": -1.0}, r"qk_norm_epsilon=-1\.0"),
        ({"qk_norm_epsilon": float("nan")}, "qk_norm_epsilon=nan"),
    ],
)
def test_bad_sizes_are_refused_by_name(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingWindowAttention(16, **options)  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = SlidingWindowAttention(16, 2, 8, 5)
    hidden_BTD = torch.randn(1, 12, 16)
    with pytest.raises(ValueError, match="hidden_BTD has shape"):
        layer(hidden_BTD[0])
    with pytest.raises(ValueError, match="mask has shape"):
        layer(hidden_BTD, mask=torch.ones(1, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"dtype torch\.float32: .* bool"):
        layer(hidden_BTD, mask=torch.full((1, 12), torch.nan))
    for positions_BT in (torch.arange(12), torch.arange(13)[None], torch.arange(12.0)[None]):
        with pytest.raises(ValueError, match="positions_BT has shape"):
            layer(hidden_BTD, positions_BT=positions_BT)
    for hidden, message in (
        (hidden_BTD.double(), r"hidden_BTD is torch\.float64 on cpu, the layer torch\.float32"),
        (hidden_BTD.to("meta"), "hidden_BTD is .* on meta, the layer .* on cpu"),
        (hidden_BTD.tolist(), "hidden_BTD is a list"),
        (hidden_BTD.to_sparse(), "hidden_BTD is sparse or nested"),
        (
            torch.nested.nested_tensor([hidden_BTD[0], hidden_BTD[0, :3]], layout=torch.jagged),
            "hidden_BTD is sparse or nested",
        ),
        (hidden_BTD[:0], r"hidden_BTD has shape \(0, 12, 16\): sizes from 1 on"),
        (hidden_BTD[:, :0], r"hidden_BTD has shape \(1, 0, 16\): sizes from 1 on"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(hidden)
    with pytest.raises(ValueError, match=r"hidden_BTD is torch\.bfloat16 on meta, the layer torch\.float32"):
        layer.to("meta")(hidden_BTD.to("meta", torch.bfloat16))
    layer = SlidingWindowAttention(16, 2, 8, 5)
    meta = torch.ones(1, 12, dtype=torch.int64, device="meta")
    for options, message in (
        ({"mask": [[True] * 12]}, "mask is a list"),
        ({"mask": meta.bool()}, "mask is on meta, hidden_BTD on cpu"),
        ({"mask": torch.ones(1, 12, dtype=torch.bool).to_sparse()}, "mask is sparse or nested"),
        ({"positions_BT": [0]}, "positions_BT is a list"),
        ({"positions_BT": meta}, "positions_BT is on meta"),
        ({"positions_BT": torch.ones(1, 12, dtype=torch.bool)}, "whole numbers"),
        ({"visibility": 5}, "visibility is a int"),
        (
            {"visibility": Visibility.build(window=5, mask_BT=torch.ones(1, 4) > 0)},
            "length 4, .* has 12",
        ),
        ({"visibility": Visibility.build(window=5, positions_BT=torch.arange(12).expand(2, -1))}, "2 rows"),
        (
            {
                "visibility": Visibility.build(
                    window=5, positions_BT=torch.arange(12)[None], key_positions_BS=torch.arange(12)[None]
                )
            },
            "visibility has key_positions_BS: the keys of a layer are its tokens' own",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            layer(hidden_BTD, **options)
    for wider in (6, None):
        with pytest.raises(ValueError, match=f"visibility has window={wider}"):
            layer(hidden_BTD, visibility=Visibility.build(window=wider))
    with torch.autocast("cpu", torch.bfloat16):
        for each, hidden in ((layer, hidden_BTD.double()), (copy.deepcopy(layer).double(), hidden_BTD)):
            with pytest.raises(ValueError, match="or use autocast, not for float64"):
                each(hidden)
    with pytest.raises(ValueError, match="mask beside visibility"):
        layer(hidden_BTD, torch.ones(1, 12, dtype=torch.bool), visibility=Visibility.build(window=5))


def test_full_attention_takes_no_window() -> None:
    with pytest.raises(ValueError, match=r"window_size=4: FlashAttention takes none, .*; try Sliding"):
        FlashAttention(16, window_size=4)


def test_the_folder_copied_alone_into_another_project_works(tmp_path: Path) -> None:
    source = Path(windowlm.attention.__path__[0])
    shutil.copytree(source, tmp_path / "other" / "borrowed")
    (tmp_path / "other" / "__init__.py").write_text("")
    program = """
import sys
sys.modules["windowlm"] = None
import torch
from other.borrowed import FlashAttention, RotaryEmbedding, SlidingWindowAttention
layer = SlidingWindowAttention(16, 2, 8, 5)
layer(torch.randn(1, 12, 16)).sum().backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


def test_value_embeddings_join_the_values_by_their_shares() -> None:
    torch.manual_seed(0)
    layer = SlidingWindowAttention(16, 4, 8, 3, dropout=0.0, kv_heads=2, value_embedding=True)
    hidden_BTD, embedding_BTE = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    with torch.no_grad():
        layer.value_shares.copy_(torch.tensor([0.3, -1.7]))  # type: ignore[union-attr]
        # The embedding reaches the values of the plain layer through sixteen more columns of its input.
        plain = SlidingWindowAttention(32, 4, 8, 3, dropout=0.0, kv_heads=2)
        for name in ("query", "key", "value"):
            wide, narrow = getattr(plain, name).weight.zero_(), getattr(layer, name).weight
            wide[:, :16] = narrow * (0.3 if name == "value" else 1.0)
        plain.value.weight[:, 16:] = -1.7 * torch.eye(16)
        plain.output.weight[:16] = layer.output.weight
    expected_BTD = plain(torch.cat([hidden_BTD, embedding_BTE], -1))[..., :16]
    torch.testing.assert_close(layer(hidden_BTD, value_embedding_BTE=embedding_BTE), expected_BTD)
    of_other_kinds: list[Any] = [
        embedding_BTE.tolist(),
        embedding_BTE.long(),
        embedding_BTE > 0,
        embedding_BTE.to_sparse(),
        embedding_BTE.to("meta"),
    ]
    for wrong in (None, embedding_BTE[..., :8], embedding_BTE[:1], *of_other_kinds):
        with pytest.raises(ValueError, match="value_embedding_BTE"):
            layer(hidden_BTD, value_embedding_BTE=wrong)
    with pytest.raises(ValueError, match="value_embedding_BTE"):
        FlashAttention(16)(hidden_BTD, value_embedding_BTE=embedding_BTE)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 1},
    {"qk_norm": True, "gate": True},
    {"sinks": 2},
    {"learned_sinks": True},
    {"logit_cap": 5.0},
    {"short_convolution": 3},
    {"causal": False},
    {"causal": False, "sinks": 9},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_option_works_on_the_meta_device(
    options: dict[str, Any], window: int | None, backend: str
) -> None:
    with torch.device("meta"):
        layer = SlidingWindowAttention(16, 2, 8, window, dropout=0.0, backend=backend, **options)
        hidden_BTD = torch.randn(2, 12, 16, requires_grad=True)
        mask = torch.ones(2, 12, dtype=torch.bool)
    for given in (None, mask):
        mixed_BTD = layer(hidden_BTD, given)
        (gradient_BTD,) = torch.autograd.grad(mixed_BTD.sum(), hidden_BTD)
        assert mixed_BTD.device.type == gradient_BTD.device.type == "meta"
        assert mixed_BTD.shape == gradient_BTD.shape == hidden_BTD.shape


def test_reset_parameters_fills_all_that_the_meta_device_left_empty() -> None:
    options: dict[str, Any] = {"learned_sinks": True, "value_embedding": True, "short_convolution": 3}
    with torch.device("meta"):
        layer = SlidingWindowAttention(16, 2, 8, 4, qk_norm=True, gate=True, **options)
    layer = layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    for module in layer.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    fresh = SlidingWindowAttention(16, 2, 8, 4, **options)
    for name in ("sink_logits", "value_shares"):
        assert torch.equal(getattr(layer, name), getattr(fresh, name))
