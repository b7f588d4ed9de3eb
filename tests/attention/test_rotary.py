"""The rotation: its definition, its exactness far out, and that nothing can spoil it."""

import math
import re
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

from windowlm.attention.config import (
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    RotaryConfig,
    RotaryScaling,
    YarnScaling,
)
from windowlm.attention.layers import SlidingWindowAttention
from windowlm.attention.rotary import RotaryEmbedding, Rotation, rotary_frequencies, rotary_magnitude


def test_each_half_split_pair_turns_by_position_times_frequency() -> None:
    heads_BTHD = torch.randn(1, 3, 2, 8, dtype=torch.float64)
    rotated = RotaryEmbedding(8)(heads_BTHD)
    for position in range(3):
        for pair in range(4):
            angle = position * 10_000.0 ** (-2 * pair / 8)
            x, y = heads_BTHD[0, position, 1, pair].item(), heads_BTHD[0, position, 1, pair + 4].item()
            assert rotated[0, position, 1, pair].item() == pytest.approx(
                x * math.cos(angle) - y * math.sin(angle), abs=1e-6
            )
            assert rotated[0, position, 1, pair + 4].item() == pytest.approx(
                y * math.cos(angle) + x * math.sin(angle), abs=1e-6
            )


def test_scores_depend_on_the_distance_alone() -> None:
    rotary = RotaryEmbedding(64)
    query, key = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)

    def score(query_position: int, key_position: int) -> float:
        turned_query = rotary(query, torch.tensor([[query_position]]))
        turned_key = rotary(key, torch.tensor([[key_position]]))
        return (turned_query * turned_key).sum().item()

    assert score(1_000_007, 1_000_000) == pytest.approx(score(7, 0), abs=1e-5)


def test_angles_a_million_tokens_out_err_by_at_most_one_in_a_million() -> None:
    position = 1_048_576
    rotation = RotaryEmbedding(64).rotation(torch.tensor([[position]]))
    angles = [position * 10_000.0 ** (-2 * pair / 64) for pair in range(32)]
    cosine = torch.tensor([math.cos(angle) for angle in angles], dtype=torch.float64)
    sine = torch.tensor([math.sin(angle) for angle in angles], dtype=torch.float64)
    assert (rotation.cosine[0, 0].double() - cosine).abs().max() <= 1e-6
    assert (rotation.sine[0, 0].double() - sine).abs().max() <= 1e-6


@pytest.mark.parametrize("scaling", [None, YarnScaling(kind="yarn", factor=8.0, original_length=2048)])
def test_nothing_that_a_model_undergoes_spoils_the_angles_a_million_tokens_out(
    scaling: RotaryScaling | None,
) -> None:
    config, positions_BT = RotaryConfig(scaling=scaling), torch.arange(1_048_570, 1_048_577)[None]
    frequencies = torch.tensor(rotary_frequencies(64, config), dtype=torch.float64)
    angles_BTF = positions_BT[..., None] * frequencies
    exact = [rotary_magnitude(config) * table.double() for table in (angles_BTF.cos(), angles_BTF.sin())]
    torch.compiler.reset()
    with torch.device("meta"):
        layer = SlidingWindowAttention(128, 2, 64, 4, 0.0, rotary=config)
    layer = layer.to_empty(device="cpu").to(torch.bfloat16)
    layer.load_state_dict(SlidingWindowAttention(128, 2, 64, 4, 0.0, rotary=config).state_dict())
    rotary = layer.rotary
    assert rotary is not None
    compiled = torch.compile(rotary.rotation, fullgraph=True, backend="aot_eager")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            rotations = [rotary.rotation(positions_BT.int()), compiled(positions_BT)]
    finally:
        torch.set_default_dtype(torch.float32)
    for rotation in rotations:
        for table, wanted in zip(rotation, exact, strict=True):
            assert table.dtype == torch.float32
            assert (table.double() - wanted).abs().max() <= 1e-6


def test_casts_default_dtypes_and_the_meta_device_change_nothing() -> None:
    positions_BT = torch.tensor([[0, 1, 5_000]])
    expected = RotaryEmbedding(64).rotation(positions_BT)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            rotary = RotaryEmbedding(64)
        rotation = rotary.to_empty(device="cpu").to(torch.bfloat16).rotation(positions_BT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rotation.cosine.dtype == torch.float32
    assert torch.equal(rotation.cosine, expected.cosine)
    assert torch.equal(rotation.sine, expected.sine)
    assert not rotary.state_dict()


def test_low_precision_is_rotated_in_float32_and_cast_afterwards() -> None:
    heads_BTHD = torch.randn(1, 100, 2, 64).bfloat16()
    rotary = RotaryEmbedding(64)
    assert torch.equal(rotary(heads_BTHD), rotary(heads_BTHD.float()).bfloat16())


def test_a_fraction_leaves_the_remaining_dimensions_alone() -> None:
    heads_BTHD = torch.randn(1, 5, 2, 16)
    rotated = RotaryEmbedding(16, RotaryConfig(fraction=0.25))(heads_BTHD)
    assert torch.equal(rotated[..., 4:], heads_BTHD[..., 4:])
    assert torch.equal(rotated[..., :4], RotaryEmbedding(4)(heads_BTHD[..., :4]))


@pytest.mark.parametrize(("dim", "fraction"), [(7, 1.0), (8, 0.1), (8, 0.375)])
def test_an_odd_or_empty_rotation_is_refused(dim: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"an even number from 2 on is allowed"):
        RotaryEmbedding(dim, RotaryConfig(fraction=fraction))


@pytest.mark.parametrize("dim", [50, 96, 100, 128])
def test_a_fraction_in_hundredths_that_is_an_even_number_is_taken_whatever_its_rounding(dim: int) -> None:
    for hundredths in range(1, 101):
        rotated, rest = divmod(hundredths * dim, 100)
        if rest == 0 and rotated % 2 == 0:
            assert RotaryEmbedding(dim, RotaryConfig(fraction=hundredths / 100)).rotated == rotated


@pytest.mark.parametrize(("dim", "fraction"), [(7, 1.0), (8, 0.1), (50, 0.3), (96, 0.333)])
def test_the_fraction_that_is_proposed_is_allowed(dim: int, fraction: float) -> None:
    with pytest.raises(ValueError, match="try fraction=") as raised:
        RotaryEmbedding(dim, RotaryConfig(fraction=fraction))
    proposed = float(str(raised.value).rpartition("=")[2])
    assert RotaryEmbedding(dim, RotaryConfig(fraction=proposed)).rotated >= 2


@pytest.mark.parametrize("dim", [0, 1, -2, 64.0, True, "64", None])
def test_a_head_dimension_that_cannot_be_rotated_is_refused(dim: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"dim={dim!r}: a head dimension from 2 on")):
        RotaryEmbedding(dim)


def test_settings_that_are_no_rotary_config_are_refused() -> None:
    config: Any = {"base": 5}
    with pytest.raises(ValueError, match=r"^config=.*: a RotaryConfig or None is allowed"):
        RotaryEmbedding(8, config)


HEADS = torch.zeros(2, 10, 8, 16)


@pytest.mark.parametrize(
    ("heads", "positions", "message"),
    [
        (HEADS, torch.arange(10), r"positions_BT has shape \(10,\) and dtype torch.int64: "),
        (HEADS, torch.arange(10.0)[None], "positions_BT has .* dtype torch.float32: .*whole numbers"),
        (HEADS, torch.arange(10)[None].bfloat16(), "positions_BT has .* dtype torch.bfloat16: "),
        (HEADS, torch.ones(1, 10, dtype=torch.bool), "positions_BT has .* dtype torch.bool: "),
        (HEADS, list(range(10)), "positions_BT is a list: "),
        (HEADS, torch.ones(2, 10, dtype=torch.int64).to_sparse(), "positions_BT is sparse or nested"),
        (HEADS, torch.arange(1)[None], r"positions_BT has shape \(1, 1\): \(2, 10\) or \(1, 10\) is allowed"),
        (HEADS, torch.zeros(3, 10, dtype=torch.int64), r"positions_BT has shape \(3, 10\): "),
        (
            HEADS,
            torch.zeros(1, 10, dtype=torch.int64, device="meta"),
            "rotation.cosine is on meta, heads_BTHD ",
        ),
        (HEADS[0], None, r"heads_BTHD has shape \(10, 8, 16\) .*: \[batch, tokens, heads, 16\] "),
        (HEADS[:, :, 0], None, "heads_BTHD has shape "),
        (torch.zeros(2, 10, 8, 32), None, r"heads_BTHD has shape .*32\) .*: \[batch, tokens, heads, 16\] "),
        (torch.zeros(2, 10, 8, 8), None, "heads_BTHD has shape "),
        (HEADS.long(), None, "heads_BTHD .* dtype torch.int64: .*torch.float16 are allowed"),
        (HEADS.tolist(), None, "heads_BTHD is a list: "),
        (HEADS.to_sparse(), None, "heads_BTHD is sparse or nested"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(heads: Any, positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(16)(heads, positions)


def test_a_rotation_of_other_frequencies_or_tokens_is_refused() -> None:
    rotary, positions_BT = RotaryEmbedding(16), torch.arange(10)[None]
    half = RotaryEmbedding(16, RotaryConfig(fraction=0.5)).rotation(positions_BT)
    with pytest.raises(ValueError, match=r"rotation.cosine has shape \(1, 10, 4\) .*: \(2, 10, 8\) or "):
        rotary.rotate(HEADS, half)
    with pytest.raises(ValueError, match=r"rotation.cosine has shape \(1, 9, 8\) "):
        rotary.rotate(HEADS, rotary.rotation(positions_BT[:, :9]))
    cosine, sine = rotary.rotation(positions_BT)
    for spoilt, message in (
        (Rotation(cosine[0], sine[0]), r"rotation.cosine has shape \(10, 8\)"),
        (Rotation(cosine[0, 0, 0], sine), r"rotation.cosine has shape \(\)"),
        (Rotation(cosine, sine.bfloat16()), r"rotation.sine has .* dtype torch.bfloat16: .* float32 are"),
        (Rotation(cosine, sine.tolist()), "rotation.sine is a list"),
    ):
        with pytest.raises(ValueError, match=message):
            rotary.rotate(HEADS, spoilt)
    for rotation in (None, (1, 2)):
        with pytest.raises(ValueError, match=r"rotation is a .*: what rotation"):
            rotary.rotate(HEADS, rotation)  # type: ignore[arg-type]


def test_gradients_of_gradients_are_those_of_the_rotation() -> None:
    rotary, positions_BT = RotaryEmbedding(6, RotaryConfig(fraction=2 / 3)), torch.tensor([[0, 3, 70]])
    heads_BTHD = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda heads: rotary(heads, positions_BT).sin(), (heads_BTHD,))
    assert torch.autograd.gradgradcheck(lambda heads: rotary(heads, positions_BT).sin(), (heads_BTHD,))


def test_a_rotation_made_in_inference_mode_serves_training() -> None:
    rotary, heads_BTHD = RotaryEmbedding(8), torch.randn(1, 5, 2, 8, requires_grad=True)
    with torch.inference_mode():
        rotation = rotary.rotation(torch.arange(5)[None])
    (gradient_BTHD,) = torch.autograd.grad(rotary.rotate(heads_BTHD, rotation).sum(), heads_BTHD)
    (wanted_BTHD,) = torch.autograd.grad(rotary(heads_BTHD).sum(), heads_BTHD)
    assert torch.equal(gradient_BTHD, wanted_BTHD)


def test_a_layer_reloaded_onto_the_meta_device_rotates_as_before() -> None:
    layer, hidden_BTD = SlidingWindowAttention(16, 2, 8, 4, dropout=0.0), torch.randn(1, 9, 16)
    with torch.device("meta"):
        reloaded = SlidingWindowAttention(16, 2, 8, 4, dropout=0.0)
    reloaded.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(reloaded(hidden_BTD), layer(hidden_BTD))


SCALINGS = [
    (
        LinearScaling(kind="linear", factor=4.0),
        {"rope_type": "linear", "factor": 4.0},
    ),
    (
        YarnScaling(kind="yarn", factor=8.0, original_length=2048),
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048},
    ),
    (
        YarnScaling(kind="yarn", factor=4.0, original_length=512, fast=16.0, slow=2.0, attention_factor=1.2),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.2,
        },
    ),
    (
        YarnScaling(kind="yarn", factor=32.0, original_length=4096, truncate=False),
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    ),
    (
        YarnScaling(kind="yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.707),
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
        },
    ),
    (
        Llama3Scaling(kind="llama3"),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
]


@pytest.mark.parametrize(("scaling", "theirs"), SCALINGS)
@pytest.mark.parametrize(("base", "fraction"), [(10_000.0, 1.0), (500_000.0, 0.5), (150_000.0, 1.0)])
def test_frequencies_and_attention_factors_equal_those_of_transformers(
    scaling: RotaryScaling, theirs: dict[str, float], base: float, fraction: float
) -> None:
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        head_dim=64,
        max_position_embeddings=16_384,
        rope_parameters={**theirs, "rope_theta": base, "partial_rotary_factor": fraction},
    )
    frequencies, factor = rope.ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu")
    ours = RotaryConfig(base=base, fraction=fraction, scaling=scaling)
    assert rotary_frequencies(int(64 * fraction), ours) == pytest.approx(frequencies.tolist(), rel=1e-5)
    assert rotary_magnitude(ours) == pytest.approx(factor)


def test_ntk_scaling_slows_the_slowest_pair_by_the_factor_and_leaves_the_fastest() -> None:
    plain = rotary_frequencies(64, RotaryConfig())
    scaled = rotary_frequencies(64, RotaryConfig(scaling=NtkScaling(kind="ntk", factor=4.0)))
    assert scaled[0] == plain[0] == 1.0
    assert scaled[-1] == pytest.approx(plain[-1] / 4.0)


def test_ntk_scaling_equals_the_dynamic_one_of_transformers_at_that_many_times_the_length() -> None:
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10_000.0},
    )
    frequencies, factor = rope.ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=4 * 2048)
    ours = RotaryConfig(scaling=NtkScaling(kind="ntk", factor=4.0))
    assert rotary_frequencies(64, ours) == pytest.approx(frequencies.tolist(), rel=1e-5)
    assert rotary_magnitude(ours) == factor


@pytest.mark.parametrize("base", [1.0000001, 1e308])
def test_extreme_settings_give_finite_frequencies(base: float) -> None:
    for scaling in (None, NtkScaling(kind="ntk", factor=1e300)):
        frequencies = rotary_frequencies(4, RotaryConfig(base=base, scaling=scaling))
        assert all(0 <= frequency <= 1 for frequency in frequencies)


def test_llama3_scaling_divides_slow_pairs_and_keeps_fast_ones() -> None:
    plain = rotary_frequencies(128, RotaryConfig(base=500_000.0))
    scaled = rotary_frequencies(
        128, RotaryConfig(base=500_000.0, scaling=Llama3Scaling(kind="llama3", factor=8.0))
    )
    turns = [8192 * frequency / (2 * math.pi) for frequency in plain]
    for before, after, turned in zip(plain, scaled, turns, strict=True):
        if turned >= 4:
            assert after == before
        elif turned <= 1:
            assert after == pytest.approx(before / 8)
        else:
            assert before / 8 < after < before


def test_yarn_scales_fast_pairs_not_at_all_slow_ones_fully_and_all_by_its_attention_factor() -> None:
    scaling = YarnScaling(kind="yarn", factor=16.0, original_length=4096)
    plain = rotary_frequencies(64, RotaryConfig())
    scaled = rotary_frequencies(64, RotaryConfig(scaling=scaling))
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(plain[-1] / 16)
    rotation = RotaryEmbedding(64, RotaryConfig(scaling=scaling)).rotation(torch.tensor([[0]]))
    assert rotation.cosine[0, 0].tolist() == pytest.approx([0.1 * math.log(16) + 1] * 32)


def test_the_rotation_survives_compilation_autocast_and_reloading() -> None:
    rotary = RotaryEmbedding(16)
    heads_BTHD = torch.randn(1, 9, 2, 16)
    expected = rotary(heads_BTHD)
    torch._dynamo.reset()
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(heads_BTHD), expected, atol=0, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotary(heads_BTHD), expected)
    reloaded = RotaryEmbedding(16)
    reloaded.load_state_dict(rotary.state_dict())
    assert torch.equal(reloaded(heads_BTHD), expected)


def test_a_compiled_model_computes_the_angles_once_for_all_layers() -> None:
    rotary = RotaryEmbedding(8)
    calls: list[int] = []

    def stack(heads_BTHD: torch.Tensor, positions_BT: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            heads_BTHD = rotary.rotate(heads_BTHD, rotary.rotation(positions_BT)).sin()
        return heads_BTHD

    def count(graph: torch.fx.GraphModule, _: object) -> Any:
        calls.append(sum("rotary.rotation" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    heads_BTHD, positions_BT = torch.randn(2, 5, 1, 8, requires_grad=True), torch.arange(5)[None]
    compiled = torch.compile(
        stack,
        backend=aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition),
        fullgraph=True,
    )
    torch.testing.assert_close(compiled(heads_BTHD, positions_BT), stack(heads_BTHD, positions_BT))
    assert calls[0] == 1
