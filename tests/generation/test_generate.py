"""Text from a model."""

import contextlib
import copy
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from windowlm import generate, load
from windowlm.attention.config import RotaryConfig, YarnScaling
from windowlm.bundle import Bundle, save_bundle
from windowlm.errors import UserError
from windowlm.generation.config import SamplingConfig
from windowlm.generation.generate import PREFILL_TOKENS, Generator, position_range, stream
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import BytesTokenizer

SHAPE: dict[str, object] = {
    "layers": 2,
    "dim": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "feed_forward_dim": 48,
    "window": [6, 9],
    "attention_sinks": 2,
    "short_convolution": 3,
}
PROMPTS = ["a", "def window(", "Größe: 😀 €", "the small window sees few keys", "x = [1, 2]"]


def graphs_alone() -> contextlib.AbstractContextManager[Any]:
    """Within it what is compiled is a graph, without kernels, which would take a minute."""
    return torch.compiler.set_stance("default", force_backend="eager")


def bundle_of(folder: Path, sequence_length: int = 4096, **changes: object) -> Bundle:
    """A model of bytes with drawn weights, as a run leaves it."""
    torch.manual_seed(0)
    config = ModelConfig(**{**SHAPE, **changes})  # type: ignore[arg-type]
    model = Decoder(config, 256)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    facts = {"vocabulary_size": 256, "sequence_length": sequence_length, "source_identity": ""}
    save_bundle(
        folder,
        model.state_dict(),
        {"model": asdict(config), **facts, "tokenizer_identity": "bytes", "data": {}, "training": {}},
        BytesTokenizer(),
    )
    return load(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(tmp_path_factory.mktemp("model"))


@torch.no_grad()
def greedy_without_cache(bundle: Bundle, prompt: str, tokens: int) -> Iterator[int]:
    """The slow twin: the whole text again for every token."""
    ids = bundle.tokenizer.encode(prompt).astype(np.int64).tolist()
    for _ in range(tokens):
        ids.append(int(bundle.model(torch.tensor([ids]))[0, -1].argmax()))
        yield ids[-1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_without_a_cache(bundle: Bundle, prompt: str) -> None:
    result = generate(bundle, prompt, temperature=0, max_new_tokens=40, stop_at_end=False)
    assert result.tokens == list(greedy_without_cache(bundle, prompt, 40))
    assert result.ended_by == "max_new_tokens"
    assert result.text == bundle.tokenizer.decode(result.tokens)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"repetition_penalty": 1.3, "top_p": 0.9}])
def test_a_seed_gives_the_same_text_in_any_batch(bundle: Bundle, settings: dict[str, float]) -> None:
    config = SamplingConfig(max_new_tokens=30, seed=5, **settings)  # type: ignore[arg-type]
    together = Generator(bundle, config).batch(PROMPTS)
    apart = [Generator(bundle, config).batch([prompt], number)[0] for number, prompt in enumerate(PROMPTS)]
    pairs = [*Generator(bundle, config).batch(PROMPTS[:2]), *Generator(bundle, config).batch(PROMPTS[2:], 2)]
    for one, other, third in zip(together, apart, pairs, strict=True):
        assert one.tokens == other.tokens == third.tokens
        assert one.nats == pytest.approx(other.nats, rel=1e-4)
    if settings.get("temperature") != 0:
        assert generate(bundle, "a", config, seed=6).tokens != together[0].tokens


def test_pieces_of_a_stream_are_the_text(bundle: Bundle) -> None:
    pieces = list(stream(bundle, "def window(", max_new_tokens=80))
    assert len(pieces) > 10
    assert "".join(pieces) == generate(bundle, "def window(", max_new_tokens=80).text


def test_bits_per_byte_are_those_of_one_call_over_the_text(bundle: Bundle) -> None:
    result = generate(bundle, "some", max_new_tokens=50, temperature=0.7, stop_at_end=False)
    ids = [*bundle.tokenizer.encode("some").tolist(), *result.tokens]
    with torch.no_grad():
        logits_TV = bundle.model(torch.tensor([ids]))[0].double()
    nats_T = -logits_TV.log_softmax(-1)[range(3, len(ids) - 1), result.tokens]
    scored = torch.tensor(result.tokens) != bundle.tokenizer.end_of_document
    assert result.bytes == int(scored.sum())
    assert result.bits_per_byte == pytest.approx(
        float(nats_T[scored].sum() / np.log(2) / result.bytes), rel=1e-5
    )


def test_a_stop_text_ends_a_row_and_not_its_neighbours(bundle: Bundle) -> None:
    free = Generator(bundle, SamplingConfig(max_new_tokens=60)).batch(PROMPTS)
    end = free[1].text[10:12]
    stopped = Generator(bundle, SamplingConfig(max_new_tokens=60, stop=[end])).batch(PROMPTS)
    assert stopped[1].ended_by == "stop"
    for before, after in zip(free, stopped, strict=True):
        assert after.text == before.text.split(end)[0]
        assert after.tokens == before.tokens[: len(after.tokens)]


def test_the_end_mark_ends_a_document(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path, tied_embeddings=False)
    with torch.no_grad():
        bundle.model.head.weight[255] = 0.0
        bundle.model.final_norm.weight.zero_()
        # Every token is as probable as the others.
        bundle.model.head.weight.zero_()
    ended = [
        result
        for result in Generator(bundle, SamplingConfig(max_new_tokens=400)).batch(["a"] * 6)
        if result.ended_by == "end_of_document"
    ]
    assert ended
    for result in ended:
        assert result.tokens[-1] == 255
        assert result.bits_per_byte == pytest.approx(8)
        assert result.bytes == len(result.tokens) - 1
    going = Generator(bundle, SamplingConfig(max_new_tokens=400, stop_at_end=False)).batch(["a"] * 6)
    assert all(result.ended_by == "max_new_tokens" for result in going)


def test_prompts_longer_than_a_call_are_read_in_chunks(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [prompt * 4 for prompt in PROMPTS]
    whole = Generator(bundle, SamplingConfig(max_new_tokens=20)).batch(texts)
    monkeypatch.setitem(PREFILL_TOKENS, "cpu", 35)
    chunked = Generator(bundle, SamplingConfig(max_new_tokens=20)).batch(texts)
    assert [result.tokens for result in chunked] == [result.tokens for result in whole]


def test_what_cannot_be_continued_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt: it is empty"):
        generate(bundle, "")
    with pytest.raises(UserError, match="half a character"):
        generate(bundle, "a\ud800")
    with pytest.raises(ValueError, match="length=3: there are max_new_tokens"):
        generate(bundle, "a", length=3)
    full = bundle_of(tmp_path / "full", 64, window=[6, None])
    assert position_range(full) == 64
    with pytest.raises(UserError, match="64 tokens, and layers that see further were trained on positions"):
        generate(full, "a" * 64)
    with pytest.raises(UserError, match="try max_new_tokens=24, or beyond_training=true"):
        generate(full, "a" * 40)
    assert len(generate(full, "a" * 40, max_new_tokens=24, stop_at_end=False).tokens) == 24
    assert generate(full, "a" * 70, max_new_tokens=3, beyond_training=True).prompt_tokens == 70
    broken = bundle_of(tmp_path / "broken")
    with torch.no_grad():
        broken.model.embedding.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="no finite numbers"):
        generate(broken, "a")


def test_the_range_of_positions_follows_scaling_and_layers_without_positions(tmp_path: Path) -> None:
    scaled = RotaryConfig(scaling=YarnScaling(kind="yarn", factor=4, original_length=64))
    assert position_range(bundle_of(tmp_path / "scaled", 64, window=None, rotary=scaled)) == 256
    assert position_range(bundle_of(tmp_path / "none", 64, window=None, rotary=None)) is None
    assert position_range(bundle_of(tmp_path / "windows", 64, attention_sinks=0)) is None
    # Sinks stay visible from any distance, and a long window reaches beyond what was seen in training.
    assert position_range(bundle_of(tmp_path / "sinks", 64)) == 64
    assert position_range(bundle_of(tmp_path / "long", 64, window=[6, 65], attention_sinks=0)) == 64


def test_rows_of_the_embedding_that_stand_for_no_text_are_not_chosen(tmp_path: Path) -> None:
    small = bundle_of(tmp_path)
    large = Decoder(small.model.config, 400)
    state = {**small.model.state_dict(), "embedding.weight": torch.randn(400, 32)}
    for name in ("embedding.weight", "head.weight"):
        state[name] = torch.cat([small.model.state_dict()[name], 9 * torch.randn(144, 32)])
    large.load_state_dict(state)
    widened = Bundle(large.eval(), small.tokenizer, small.config, small.folder)
    for compiled in (False, True):
        settings = SamplingConfig(max_new_tokens=40, stop_at_end=False)
        with graphs_alone():
            (result,) = Generator(widened, settings, compiled=compiled).batch(["some"])
        assert max(result.tokens) < 256
        assert result.bytes == sum(token != 255 for token in result.tokens)


def test_steps_of_fixed_shape_choose_the_same_tokens(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SamplingConfig(max_new_tokens=20, top_p=0.9, repetition_penalty=1.2, stop_at_end=False)
    launched, stepped = (Generator(bundle, settings) for _ in range(2))
    # What a GPU records.
    monkeypatch.setattr(stepped, "_steps_token", True)
    tokens = [[result.tokens for result in generator.batch(PROMPTS)] for generator in (launched, stepped)]
    assert tokens[0] == tokens[1]


def assert_same_tokens_compiled(bundle: Bundle, prompts: list[str], **given: Any) -> None:
    settings = SamplingConfig(max_new_tokens=12, stop_at_end=False, **given)
    compiled = Generator(bundle, settings, compiled=True).batch(prompts)
    assert [result.tokens for result in compiled] == [
        result.tokens for result in Generator(bundle, settings).batch(prompts)
    ]


def test_compiled_steps_choose_the_same_tokens(tmp_path: Path) -> None:
    torch.compiler.reset()
    bundle = bundle_of(tmp_path, layers=1, window=6)
    sampling = {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    penalty = {"repetition_penalty": 1.5, "repetition_window": 5}
    assert_same_tokens_compiled(bundle, PROMPTS, **sampling, **penalty)


def test_the_pace_leaves_out_what_compiling_took(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: time.sleep(2) or function)
    generator = Generator(bundle, SamplingConfig(max_new_tokens=3, stop_at_end=False), compiled=True)
    generator.batch(["a text"])
    assert generator.pace.compile_seconds >= 2
    assert generator.pace.seconds < 2


def test_steps_are_compiled_once_for_rows_alike_and_once_for_others(bundle: Bundle) -> None:
    torch.compiler.reset()
    counters.clear()
    with graphs_alone():
        for prompts in (PROMPTS, PROMPTS[1:2], PROMPTS, PROMPTS[2:3]):
            assert_same_tokens_compiled(bundle, prompts, temperature=0)
    # Of the prompts and of the steps behind them.
    assert counters["stats"]["unique_graphs"] == 2 + 2


@pytest.mark.parametrize("prompt", ["a", "def window("])
def test_a_machine_without_a_compiler_is_told_so(bundle: Bundle, prompt: str) -> None:
    torch.compiler.reset()
    generator = Generator(bundle, SamplingConfig(max_new_tokens=3, stop_at_end=False), compiled=True)
    without = inductor.patch({"cpp.cxx": ("/nowhere/g++",)})
    with fresh_cache(), without, pytest.raises(UserError, match=r"torch finds no C\+\+ compiler"):
        generator.batch([prompt])
    torch.compiler.reset()


def test_a_backend_by_name_and_compiled_steps_are_refused_together(bundle: Bundle) -> None:
    model = copy.deepcopy(bundle.model)
    model.config = replace(model.config, backend="reference")
    with pytest.raises(UserError, match="compile=true"):
        Generator(replace(bundle, model=model), SamplingConfig(), compiled=True)


def test_a_stream_may_begin_and_end_in_other_modes(bundle: Bundle) -> None:
    settings = SamplingConfig(max_new_tokens=12, seed=3, stop_at_end=False)
    whole = "".join(stream(bundle, "the cat", settings))
    for first, then in (
        (torch.inference_mode(), contextlib.nullcontext()),
        (contextlib.nullcontext(), torch.inference_mode()),
        (torch.no_grad(), torch.enable_grad()),
    ):
        pieces = stream(bundle, "the cat", settings)
        with first:
            begun = next(pieces)
        with then:
            assert begun + "".join(pieces) == whole
    assert torch.is_grad_enabled()
    next(stream(bundle, "the cat", settings))
    assert torch.is_grad_enabled()


def test_a_stream_that_is_left_at_the_end_of_the_interpreter_says_nothing(tmp_path: Path) -> None:
    bundle_of(tmp_path)
    code = f"from windowlm import load, stream; s = stream(load({str(tmp_path)!r}), 'the cat'); next(s)"
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert left.stderr == ""


def test_what_is_no_prompt_or_no_bundle_is_refused(bundle: Bundle) -> None:
    wrong: list[Any] = [None, ["a"], b"a", 3]
    for prompt in wrong:
        with pytest.raises(UserError, match=r"a text \(str\) is allowed"):
            generate(bundle, prompt)
    with pytest.raises(UserError, match="prompts: there is none"):
        Generator(bundle, SamplingConfig()).batch([])
    folder: Any = "runs/a"
    with pytest.raises(UserError, match=r"bundle='runs/a': what windowlm\.load gives"):
        generate(folder, "a")
