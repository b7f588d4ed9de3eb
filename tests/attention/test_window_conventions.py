"""How others count: each package at hand is asked for its mask, and the keys are counted."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from windowlm.attention import window_conventions as conventions
from windowlm.attention.window import Visibility
from windowlm.attention.window_conventions import Window, from_mask

TOKENS = 24
WINDOWS = [2, 3, 5, 12]


def ours(window: int | None, causal: bool = True) -> Tensor:
    return Visibility.build(window=window, causal=causal).mask(TOKENS, TOKENS, torch.device("cpu"))[0]


def seen_by(attend: Callable[[Tensor], Tensor]) -> Tensor:
    """The keys whose value changes each query's output: `attend` mixes values [T, T]."""
    return attend(torch.eye(TOKENS)) != 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [2, 5, None])
def test_conversions_there_and_back_keep_the_window(window: int | None, causal: bool) -> None:
    assert conventions.from_flash_attention(conventions.to_flash_attention(window, causal)) == (
        window,
        causal,
    )
    assert conventions.from_onnx(**conventions.to_onnx(window, causal)) == (window, causal)
    assert conventions.from_mask_mod(conventions.to_mask_mod(window, causal), TOKENS) == (window, causal)
    assert from_mask(ours(window, causal)) == (window, causal)
    number = conventions.to_transformers(window, causal)
    assert conventions.from_transformers(number, causal) == (window, causal)


@pytest.mark.parametrize("window", WINDOWS)
def test_local_attention_there_and_back(window: int) -> None:
    assert conventions.from_local_attention(**conventions.to_local_attention(window)) == Window(window)


def test_what_others_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window_size=\(3, 1\)"):
        conventions.from_flash_attention((3, 1))
    with pytest.raises(ValueError, match=r"window_size=\(-2, 0\)"):
        conventions.from_flash_attention((-2, 0))
    with pytest.raises(ValueError, match="window=1: a number from 2 on"):
        conventions.to_local_attention(1)
    with pytest.raises(ValueError, match="sees from 5 to 8 keys"):
        conventions.from_local_attention(4)
    with pytest.raises(ValueError, match="a mask in which 3 queries see 1, 2, 1 keys: a window shows"):
        from_mask(torch.tensor([[True, False, False], [True, True, False], [False, False, True]]))
    with pytest.raises(
        ValueError, match=r"a mask in which 90 queries see 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. keys: "
    ):
        from_mask(torch.ones(90, 90, dtype=torch.bool).tril(-1))
    with pytest.raises(ValueError, match="sliding_window=0"):
        conventions.from_transformers(0)
    with pytest.raises(
        ValueError, match=r"^left_window_size=3, right_window_size=-1: .* right_window_size=3"
    ):
        conventions.from_onnx(0, 3, -1)


WRONG_NUMBERS: list[Any] = [True, 2.5, "4", -5, torch.tensor(3)]
BOOLS = torch.ones(3, 3, dtype=torch.bool).tril()


@pytest.mark.parametrize("given", WRONG_NUMBERS)
def test_numbers_of_another_kind_or_range_are_refused_by_name(given: Any) -> None:
    for to in (
        conventions.to_flash_attention,
        conventions.to_transformers,
        conventions.to_onnx,
        conventions.to_local_attention,
        conventions.to_mask_mod,
    ):
        with pytest.raises(ValueError, match=r"^window="):
            to(given)
    for causal in (True, False):
        with pytest.raises(ValueError, match=r"^sliding_window="):
            conventions.from_transformers(given, causal)
    for size in ((given, 0), (3, given), [given, given]):
        with pytest.raises(ValueError, match=r"^window_size=.* whole numbers from 0 on"):
            conventions.from_flash_attention(size)
    for name in ("left_window_size", "right_window_size"):
        with pytest.raises(ValueError, match=rf"^{name}="):
            conventions.from_onnx(1, **{name: given})
    with pytest.raises(ValueError, match=r"^window_size="):
        conventions.from_local_attention(given, True)
    with pytest.raises(ValueError, match=r"^look_backward="):
        conventions.from_local_attention(4, True, given)
    with pytest.raises(ValueError, match=r"^length="):
        conventions.from_mask_mod(conventions.to_mask_mod(2), given)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        *(
            (lambda size=size: conventions.from_flash_attention(size), "window_size=.*: two numbers, ")
            for size in (3, None, (3,), (3, 0, 0), "30")
        ),
        (lambda: conventions.from_onnx(2), "is_causal=2: 0 or 1"),
        (lambda: conventions.from_onnx(1.0), "is_causal=1.0: 0 or 1"),
        (lambda: conventions.from_local_attention(0, True), "window_size=0: a whole number from 1 on"),
        (lambda: conventions.from_local_attention(4, 1), "exact_windowsize=1: True or False"),
        (lambda: conventions.from_local_attention(4, True, look_forward=1), "look_forward=1: "),
        (lambda: conventions.from_mask_mod(3, 8), "mask_mod=3: a function"),
        (lambda: conventions.from_mask_mod(lambda *_: True, 8), "mask_mod gives bool: a tensor of bool"),
        (lambda: conventions.from_mask_mod(lambda query, key: query >= key, 8), "mask_mod=<function .* four"),
        (
            lambda: conventions.from_mask_mod(lambda b, h, q, k: q >= k if q > 3 else q == k, 8),
            "mask_mod fails",
        ),
        (
            lambda: conventions.from_mask_mod(lambda b, h, q, k: [True, False][k], 8),
            "mask_mod fails on queries",
        ),
        (lambda: conventions.from_mask_mod(lambda *_: BOOLS, 8), r"mask_mod gives shape \(3, 3\) "),
        (lambda: conventions.from_mask_mod(lambda *_: BOOLS[None], 3), r"mask_mod gives shape \(1, 3, 3\) "),
        (lambda: conventions.from_mask_mod(conventions.to_mask_mod(2), 1), "length=1: "),
        (lambda: from_mask(BOOLS.float()), "visible_TT has shape .* dtype torch.float32: .*bool"),
        (lambda: from_mask(BOOLS[:2]), r"visible_TT has shape \(2, 3\) "),
        (lambda: from_mask(BOOLS[None]), r"visible_TT has shape \(1, 3, 3\) "),
        (lambda: from_mask(BOOLS[:1, :1]), r"visible_TT has shape \(1, 1\) "),
        (lambda: from_mask(BOOLS[:0, :0]), r"visible_TT has shape \(0, 0\) "),
        (lambda: from_mask(BOOLS[0, 0]), r"visible_TT has shape \(\) "),
        (lambda: from_mask(BOOLS.tolist()), "visible_TT is a list: "),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(convert: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        convert()


def test_windows_longer_than_any_sequence_are_given_as_one_length() -> None:
    for window in (2**30 + 2, 10**30):
        for causal in (True, False):
            assert conventions.from_flash_attention(
                conventions.to_flash_attention(window, causal), causal
            ) == (2**30 + 1, causal)
            told = conventions.to_transformers(window, causal)
            assert conventions.from_transformers(told, causal) == (2**30 + 1, causal)
        assert conventions.from_local_attention(**conventions.to_local_attention(window)) == (2**30 + 1, True)


def test_a_direction_that_is_no_boolean_is_refused() -> None:
    wrong: Any = "no"
    for convert in (
        conventions.to_flash_attention,
        conventions.to_transformers,
        conventions.from_transformers,
        conventions.to_onnx,
        conventions.to_mask_mod,
    ):
        with pytest.raises(ValueError, match=r"^causal='no': True or False"):
            convert(4, wrong)
    with pytest.raises(ValueError, match=r"^causal='no': True or False"):
        conventions.from_flash_attention((3, 0), wrong)
    with pytest.raises(ValueError, match=r"^causal='no': True or False"):
        conventions.from_local_attention(4, True, causal=wrong)


def test_a_mask_of_no_more_tokens_than_the_window_shows_none() -> None:
    mask_mod = conventions.to_mask_mod(8)
    assert conventions.from_mask_mod(mask_mod, 8) == Window(None)
    assert conventions.from_mask_mod(mask_mod, 9) == Window(8)
    assert conventions.from_mask_mod(lambda b, h, q, k: k >= 0, 8) == Window(None, causal=False)
    assert conventions.from_mask_mod(conventions.to_mask_mod(1, causal=False), 8) == Window(1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_flex_attention_sees_the_window(window: int, causal: bool) -> None:
    mask = create_mask(conventions.to_mask_mod(window, causal), 1, 1, TOKENS, TOKENS, device="cpu")
    assert torch.equal(mask[0, 0], ours(window, causal))


@pytest.mark.parametrize("window", WINDOWS)
def test_transformers_counts_the_query(window: int) -> None:
    pytest.importorskip("transformers")
    from transformers import MistralConfig, MistralModel

    config = MistralConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        sliding_window=conventions.to_transformers(window),
        attn_implementation="eager",
    )
    model = MistralModel(config).eval()
    weights = model(torch.zeros(1, TOKENS, dtype=torch.int64), output_attentions=True).attentions[0][0, 0]
    assert from_mask(weights > 0) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_transformers_does_not_count_the_query_in_bidirectional_models(window: int) -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    number = conventions.to_transformers(window, causal=False)
    mask_mod = masking.sliding_window_bidirectional_mask_function(number)
    index_T = torch.arange(TOKENS)
    assert from_mask(mask_mod(0, 0, index_T[:, None], index_T[None])) == (window, False)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_onnx_does_not_count_the_query(window: int, causal: bool) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    if onnx.defs.onnx_opset_version() < 25:
        pytest.skip("this onnx has no opset 25")
    names = ("query", "key", "value", "output")
    shapes = [helper.make_tensor_value_info(name, 1, [1, 1, TOKENS, TOKENS]) for name in names]
    node = helper.make_node("Attention", names[:3], names[3:], **conventions.to_onnx(window, causal))
    graph = helper.make_graph([node], "window", shapes[:3], shapes[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)])

    def attend(value_TT: Tensor) -> Tensor:
        zeros = torch.zeros(1, 1, TOKENS, TOKENS).numpy()
        feeds = {"query": zeros, "key": zeros, "value": value_TT[None, None].numpy()}
        return torch.from_numpy(ReferenceEvaluator(model).run(None, feeds)[0])[0, 0]

    assert from_mask(seen_by(attend)) == (window, causal)


@pytest.mark.parametrize("window", WINDOWS)
def test_megatron_does_not_count_the_query(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what else could be installed
        utils = pytest.importorskip("megatron.core.transformer.utils", exc_type=ImportError)
    ones = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *size, device, **options: ones(*size, **options)
    )  # it says "cuda"
    hidden = utils.get_sliding_window_causal_mask(TOKENS, TOKENS, conventions.to_flash_attention(window))
    assert from_mask(~hidden) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_jax_does_not_count_the_query(window: int) -> None:
    jax = pytest.importorskip("jax")
    zeros = jax.numpy.zeros((1, TOKENS, 1, TOKENS))

    def attend(value_TT: Tensor) -> Tensor:
        value = jax.numpy.asarray(value_TT.numpy())[None, :, None]
        mixed = jax.nn.dot_product_attention(
            zeros, zeros, value, is_causal=True, local_window_size=conventions.to_flash_attention(window)
        )
        return torch.tensor(mixed.tolist())[0, :, 0]

    assert from_mask(seen_by(attend)) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_local_attention_sees_one_key_more_than_its_number_and_up_to_twice_as_many_by_default(
    window: int,
) -> None:
    package = pytest.importorskip("local_attention")

    def keys(**arguments: object) -> Tensor:
        attention = package.LocalAttention(dim=TOKENS, autopad=True, use_rotary_pos_emb=False, **arguments)
        zeros = torch.zeros(1, TOKENS, TOKENS)
        return seen_by(lambda value_TT: attention(zeros, zeros, value_TT[None])[0])

    assert from_mask(keys(**conventions.to_local_attention(window))) == (window, True)
    by_default = keys(window_size=window, causal=True).sum(1)[window:]
    assert (by_default.min(), by_default.max()) == (window + 1, 2 * window)


@pytest.mark.parametrize("window", WINDOWS)
def test_litgpt_counts_the_query(window: int) -> None:
    model = pytest.importorskip("litgpt.model", exc_type=ImportError)
    config = model.Config(
        n_layer=1,
        n_head=1,
        n_embd=TOKENS,
        head_size=TOKENS,
        block_size=TOKENS,
        padded_vocab_size=8,
        bias=False,
        rotary_percentage=0.0,
        sliding_window_size=window,
        sliding_window_indices=[1],
    )
    layer = model.CausalSelfAttention(config, 0)
    zeros, eye = torch.zeros(2 * TOKENS, TOKENS), torch.eye(TOKENS)
    layer.qkv.weight, layer.proj.weight = nn.Parameter(torch.cat([zeros, eye])), nn.Parameter(eye)
    rotation = torch.ones(1, TOKENS, 0)
    assert from_mask(seen_by(lambda value_TT: layer(value_TT[None], rotation, rotation)[0])) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_torchtitan_counts_the_query_in_its_flex_mask(window: int) -> None:
    attention = pytest.importorskip("torchtitan.models.common.attention", exc_type=ImportError)
    mask_mod = attention.get_sliding_window_mask_mod(window)
    assert conventions.from_mask_mod(mask_mod, TOKENS) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_torchtitan_does_not_count_the_query_in_its_varlen_attention(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = pytest.importorskip("torchtitan.models.common.attention", exc_type=ImportError)
    given: list[tuple[int, int]] = []

    def record(query: Tensor, *_: object, window_size: tuple[int, int], **__: object) -> Tensor:
        given.append(window_size)
        return query

    # torch's own runs on CUDA only; what reaches it is counted in its test.
    monkeypatch.setattr(attention, "varlen_attn", record)
    size = conventions.to_flash_attention(window)
    layer = attention.VarlenAttention(attention.VarlenAttention.Config(window_size=size))
    offsets, zeros = torch.tensor([0, TOKENS], dtype=torch.int32), torch.zeros(1, TOKENS, 1, 8)
    layer(zeros, zeros, zeros, attention_masks=attention.VarlenMetadata(offsets, offsets, TOKENS, TOKENS))
    assert given == [size]
    assert conventions.from_flash_attention(given[0]) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_attention_gym_does_not_count_the_query(window: int) -> None:
    masks = pytest.importorskip("attn_gym.masks")
    mask_mod = masks.generate_sliding_window(conventions.to_flash_attention(window)[0])
    assert conventions.from_mask_mod(mask_mod, TOKENS) == (window, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformer Engine runs on CUDA only")
@pytest.mark.parametrize("window", WINDOWS)
def test_transformer_engine_does_not_count_the_query(window: int) -> None:
    utils = pytest.importorskip(
        "transformer_engine.pytorch.attention.dot_product_attention.utils", exc_type=ImportError
    )
    size = conventions.to_flash_attention(window)
    hidden = utils.get_full_mask(TOKENS, TOKENS, attn_mask_type="causal", window_size=size)[1]
    assert from_mask(~hidden[0, 0]) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_olmo_core_counts_the_query(window: int) -> None:
    attention = pytest.importorskip("olmo_core.nn.attention", exc_type=ImportError)
    layer = attention.Attention(d_model=TOKENS, n_heads=1, window_size=window, bias=False)
    for weight in (layer.w_v.weight, layer.w_out.weight):
        nn.init.eye_(weight)
    nn.init.zeros_(layer.w_q.weight)
    assert from_mask(seen_by(lambda value_TT: layer(value_TT[None])[0])) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_flash_linear_attention_counts_the_query(window: int) -> None:
    naive = pytest.importorskip("fla.ops.attn.naive", exc_type=ImportError)
    zeros = torch.zeros(1, TOKENS, 1, TOKENS)

    def attend(value_TT: Tensor) -> Tensor:
        value = value_TT[None, :, None]
        return naive.naive_parallel_attn(zeros, zeros, value, window_size=window)[0][0, :, 0]

    assert from_mask(seen_by(attend)) == (window, True)


@pytest.mark.parametrize("window", WINDOWS)
def test_xformers_counts_the_query_in_one_number_and_not_in_two(window: int) -> None:
    bias = pytest.importorskip("xformers.ops.fmha.attn_bias", exc_type=ImportError)
    shape = (TOKENS, TOKENS)
    one_number = bias.LowerTriangularFromBottomRightMask().make_local_attention(window)
    assert from_mask(one_number.materialize(shape) == 0) == (window, True)
    two_numbers = bias.LocalAttentionFromBottomRightMask(*conventions.to_flash_attention(window, False))
    assert from_mask(two_numbers.materialize(shape) == 0) == (window, False)
    padded = bias.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(
        [TOKENS], TOKENS, [TOKENS], *conventions.to_flash_attention(window)
    )
    assert from_mask(padded.materialize(shape) == 0) == (window, True)


@pytest.mark.parametrize("window", [4, 6])
def test_modernbert_and_longformer_see_one_key_more_than_their_number(window: int) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1}
    special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    tokens_BT = torch.ones(1, TOKENS, dtype=torch.int64)
    bert = transformers.ModernBertModel(
        transformers.ModernBertConfig(
            **sizes, **special, num_hidden_layers=2, local_attention=window, attn_implementation="eager"
        )
    ).eval()
    weights = bert(tokens_BT, output_attentions=True).attentions[1][0, 0]
    assert from_mask(weights > 0) == (window // 2 + 1, False)
    assert (weights[TOKENS // 2] > 0).sum() == window + 1
    longformer = transformers.LongformerModel(
        transformers.LongformerConfig(**sizes, num_hidden_layers=1, attention_window=window)
    ).eval()
    # Columns are distances here, one for each key in reach.
    weights = longformer(tokens_BT, output_attentions=True).attentions[0][0, 0]
    assert (weights[TOKENS // 2] > 0).sum() == window + 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen_attn runs on CUDA only")
@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_attn_does_not_count_the_query(window: int) -> None:
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.tensor([0, TOKENS], dtype=torch.int32, device="cuda")
    zeros = torch.zeros(TOKENS, 1, 32, dtype=torch.bfloat16, device="cuda")

    def attend(value_TT: Tensor) -> Tensor:
        value = torch.nn.functional.pad(value_TT, (0, 32 - TOKENS)).to(zeros)[:, None]
        size = conventions.to_flash_attention(window)
        mixed = varlen_attn(zeros, zeros, value, offsets, offsets, TOKENS, TOKENS, window_size=size)
        return mixed[:, 0, :TOKENS].cpu()

    assert from_mask(seen_by(attend)) == (window, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-attn runs on CUDA only")
@pytest.mark.parametrize("module", ["flash_attn.flash_attn_interface", "flash_attn.cute"])
@pytest.mark.parametrize("window", WINDOWS)
def test_flash_attn_does_not_count_the_query(window: int, module: str) -> None:
    package = pytest.importorskip(module, exc_type=ImportError)
    zeros = torch.zeros(1, TOKENS, 1, 64, dtype=torch.bfloat16, device="cuda")

    def attend(value_TT: Tensor) -> Tensor:
        value = torch.nn.functional.pad(value_TT, (0, 64 - TOKENS)).to(zeros)[None, :, None]
        size = conventions.to_flash_attention(window)
        mixed = package.flash_attn_func(zeros, zeros, value, causal=True, window_size=size)
        return (mixed[0] if isinstance(mixed, tuple) else mixed)[0, :, 0, :TOKENS].cpu()

    assert from_mask(seen_by(attend)) == (window, True)


def test_the_page_converts_as_it_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "attention-window.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    checked, claims = re.subn(
        r"^(\w.*)  # (.*)$", r"assert repr(\1) == repr(\2)", example, flags=re.MULTILINE
    )
    assert claims == 4
    exec(checked, {"Window": Window})
