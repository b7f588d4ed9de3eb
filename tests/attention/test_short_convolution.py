import pytest
import torch
import torch.nn.functional as F

from windowlm import SlidingWindowAttention
from windowlm.attention.short_convolution import ShortConvolution
from windowlm.attention.window import Visibility


def slow_twin(weight_CHD: torch.Tensor, channels_BTHD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """torch's own convolution over each document apart, with zeros before its first token."""
    taps = len(weight_CHD)
    kernel = weight_CHD.flatten(1).T.flip(1)[:, None]
    convolved = [
        F.conv1d(F.pad(text.flatten(2).mT, (taps - 1, 0)), kernel, groups=len(kernel)).mT
        for text in channels_BTHD.split(lengths, 1)
    ]
    return torch.cat(convolved, 1).view_as(channels_BTHD)


@pytest.mark.parametrize("taps", [2, 3, 4, 7])
@pytest.mark.parametrize(("length", "compiled"), [(1, False), (2, False), (3, False), (4, True), (63, False)])
def test_outputs_and_gradients_are_those_of_the_slow_twin(taps: int, length: int, compiled: bool) -> None:
    torch.manual_seed(0)
    layer = ShortConvolution(3, 5, taps).double()
    torch.nn.init.normal_(layer.weight_CHD)
    lengths = [length, 1, taps, 2]
    behind_BT = torch.cat([torch.arange(n) for n in lengths])[None]
    channels_BTHD = torch.randn(2, sum(lengths), 3, 5, dtype=torch.float64, requires_grad=True)
    push_BTHD = torch.randn_like(channels_BTHD)
    if compiled:
        torch.compiler.reset()
        layer.compile(fullgraph=True, backend="aot_eager")
    fast_BTHD = layer(channels_BTHD, behind_BT)
    slow_BTHD = slow_twin(layer.weight_CHD, channels_BTHD, lengths)
    torch.testing.assert_close(fast_BTHD, slow_BTHD)
    inputs = (channels_BTHD, layer.weight_CHD)
    for fast, slow in zip(
        torch.autograd.grad(fast_BTHD, inputs, push_BTHD),
        torch.autograd.grad(slow_BTHD, inputs, push_BTHD),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow)


def test_it_starts_as_the_identity_and_keeps_the_dtype() -> None:
    layer = ShortConvolution(2, 4, 3)
    channels_BTHD = torch.randn(2, 9, 2, 4).bfloat16()
    output_BTHD = layer(channels_BTHD, torch.arange(9)[None])
    assert output_BTHD.dtype is torch.bfloat16
    assert torch.equal(output_BTHD, channels_BTHD)


def test_the_layer_convolves_queries_keys_and_values_before_their_norms() -> None:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "kv_heads": 2, "qk_norm": True}
    layer = SlidingWindowAttention(16, 4, 8, 5, short_convolution=3, **options)  # type: ignore[arg-type]
    plain = SlidingWindowAttention(16, 4, 8, 5, **options)  # type: ignore[arg-type]
    plain.load_state_dict(layer.state_dict(), strict=False)
    hidden_BTD, lengths = torch.randn(2, 20, 16), [7, 13]
    visibility = Visibility.build(window=5, documents_BT=torch.tensor([[0] * 7 + [1] * 13]))
    torch.testing.assert_close(
        layer(hidden_BTD, visibility=visibility), plain(hidden_BTD, visibility=visibility)
    )
    convolved = []
    assert layer.convolutions is not None
    for name, heads in (("query", 4), ("key", 2), ("value", 2)):
        weight_CHD = torch.nn.init.normal_(layer.convolutions[name].weight_CHD)
        projected = getattr(layer, name)(hidden_BTD).view(2, 20, heads, 8)
        convolved.append(slow_twin(weight_CHD, projected, lengths))
    expected_BTD = layer.output(plain.mix(*convolved, visibility).flatten(2))
    torch.testing.assert_close(layer(hidden_BTD, visibility=visibility), expected_BTD)


@pytest.mark.parametrize("taps", [1, 0, -3, 2.0, True])
def test_fewer_than_two_taps_are_refused(taps: object) -> None:
    with pytest.raises(ValueError, match="short_convolution="):
        SlidingWindowAttention(16, 2, 8, short_convolution=taps)  # type: ignore[arg-type]
