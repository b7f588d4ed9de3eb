"""An exported folder opens in transformers and gives the same logits, text and tokens."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interchange.models import SHAPE, TEXT, random_decoder, trained_bpe
from windowlm.attention.config import (
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    RotaryConfig,
    YarnScaling,
)
from windowlm.errors import UserError
from windowlm.interchange.config_out import transformers_config
from windowlm.interchange.export import export_to_transformers
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import BytesTokenizer, Tokenizer

transformers = pytest.importorskip("transformers")
RIGHT_ABOUT_THE_WINDOW = ("eager", "sdpa", "flex_attention")
# Wrong are the paged ones: their masks come from the cache of continuous batching, and a plain forward shows
# each token the future.
# Of packages that need a GPU; what transformers hands them is looked at below.
NEEDS_A_GPU = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
TOKENS = 100  # far beyond the windows


def rotated(**scaling: Any) -> dict[str, Any]:
    return {"qk_norm": False, "rotary": RotaryConfig(**scaling)}


MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "one window": ({"qk_norm": False}, "Mistral"),
    "no window": ({"qk_norm": False, "window": None, "tied_embeddings": False}, "Mistral"),
    "window of two": ({"qk_norm": False, "window": 2}, "Mistral"),
    "norms": ({}, "Qwen3"),
    "norms, and full layers": ({"window": [8, 8, None]}, "Qwen3"),
    "coarse epsilon beside norms": ({"norm_epsilon": 1e-3}, "Qwen3"),
    "full layers": ({"qk_norm": False, "window": [8, None]}, "SmolLM3"),
    "layers without positions": (
        {"qk_norm": False, "window": [8, 8, None], "rotary": [RotaryConfig(base=500.0), None]},
        "SmolLM3",
    ),
    "biases": ({"qk_norm": False, "qkv_bias": True}, "SmolLM3"),
    "biases, and no positions": ({"qk_norm": False, "qkv_bias": True, "rotary": None}, "SmolLM3"),
    "biases, and full layers": ({"qk_norm": False, "qkv_bias": True, "window": [None, 8]}, "SmolLM3"),
    "own epsilon in norms": ({"qk_norm_epsilon": 1e-2}, "Qwen3"),
    "no positions": ({"qk_norm": False, "rotary": None}, "SmolLM3"),
    "another base": (rotated(base=123.0), "Mistral"),
    "linear": (rotated(scaling=LinearScaling(kind="linear", factor=4.0)), "Mistral"),
    "ntk": (rotated(scaling=NtkScaling(kind="ntk", factor=4.0)), "Mistral"),
    "yarn": (rotated(scaling=YarnScaling(kind="yarn", factor=4.0, original_length=32)), "Mistral"),
    "yarn, not rounded": (
        rotated(scaling=YarnScaling(kind="yarn", factor=4.0, original_length=32, truncate=False)),
        "Mistral",
    ),
    "yarn with mscale": (
        rotated(
            scaling=YarnScaling(kind="yarn", factor=4.0, original_length=32, mscale=1.4, mscale_all_dim=0.3)
        ),
        "Mistral",
    ),
    "yarn with its factor": (
        rotated(scaling=YarnScaling(kind="yarn", factor=4.0, original_length=32, attention_factor=1.3)),
        "Mistral",
    ),
    "llama3": (rotated(scaling=Llama3Scaling(kind="llama3", factor=4.0, original_length=32)), "Mistral"),
}


def exported(folder: Path, model: Decoder, tokenizer: Tokenizer | None = None) -> Path:
    out = folder / "out"
    export_to_transformers(model, tokenizer or BytesTokenizer(), out, sequence_length=64, card="# card")
    return out


def opened(folder: Path, implementation: str = "sdpa") -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    return found.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_agree_beyond_the_window(name: str, implementation: str, tmp_path: Path) -> None:
    changes, architecture = MODELS[name]
    model = random_decoder(**changes)
    theirs = opened(exported(tmp_path, model), implementation)
    assert type(theirs).__name__ == f"{architecture}ForCausalLM"
    tokens_BT = torch.randint(255, (2, TOKENS))
    torch.testing.assert_close(theirs(tokens_BT).logits, model(tokens_BT), atol=1e-4, rtol=0)


@pytest.mark.usefixtures("no_kernels")
@torch.no_grad()
def test_logits_agree_in_flex_attention(tmp_path: Path) -> None:
    model = random_decoder(window=[8, None])
    tokens_BT = torch.randint(255, (1, TOKENS))
    theirs = opened(exported(tmp_path, model), "flex_attention")
    torch.testing.assert_close(theirs(tokens_BT).logits, model(tokens_BT), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("change", [-1, 1])
def test_a_window_of_one_key_more_or_less_would_be_seen(change: int, tmp_path: Path) -> None:
    model = random_decoder(qk_norm=False)
    other = Decoder(ModelConfig(**{**SHAPE, "qk_norm": False, "window": 8 + change}), 256).eval()
    other.load_state_dict(model.state_dict())
    tokens_BT = torch.randint(255, (1, TOKENS))
    theirs = opened(exported(tmp_path, model))(tokens_BT).logits
    assert (theirs - other(tokens_BT)).abs().max() > 0.1


@torch.no_grad()
def test_every_implementation_of_transformers_is_named(tmp_path: Path) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    listed = set(ALL_ATTENTION_FUNCTIONS.valid_keys())
    # Versions differ in which of the paged ones they list, and by which names.
    paged = {name for name in listed if "paged" in name}
    assert listed - paged <= {*RIGHT_ABOUT_THE_WINDOW, *NEEDS_A_GPU}
    model = random_decoder(qk_norm=False)
    tokens_BT = torch.randint(255, (1, TOKENS))
    (name,) = (name for name in paged if "eager" in name)
    theirs = opened(exported(tmp_path, model), name)(tokens_BT).logits
    assert (theirs - model(tokens_BT)).abs().max() > 1


def test_what_flash_attention_is_handed_is_our_window() -> None:
    from transformers import modeling_flash_attention_utils as flash

    from windowlm.attention.window_conventions import from_flash_attention, to_transformers

    process = getattr(flash, "_process_flash_attention_kwargs", None)
    if process is None:
        pytest.skip("another version of transformers")
    handed = process(
        query_length=TOKENS,
        key_length=TOKENS,
        is_causal=True,
        sliding_window=to_transformers(8),
        supports_mapping=defaultdict(bool, window_size=True),
    )
    left, right = handed["window_size"]
    # Beside causal a right side of any size shows no later key; other numbers are unknown to us.
    assert right in (0, left)
    assert from_flash_attention((left, 0), causal=True).window == 8


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["one window", "norms, and full layers", "layers without positions"])
def test_256_greedy_tokens_agree(name: str, implementation: str, tmp_path: Path) -> None:
    model = random_decoder(**MODELS[name][0])
    theirs = opened(exported(tmp_path, model), implementation)
    tokens_BT = torch.randint(255, (1, 20))
    found_BT = theirs.generate(tokens_BT, max_new_tokens=256, do_sample=False, eos_token_id=None)
    cache = model.new_cache()
    chunk_BT, text_BT = tokens_BT, tokens_BT
    for _ in range(256):
        chunk_BT = model(chunk_BT, cache=cache)[:, -1:].argmax(-1)
        text_BT = torch.cat([text_BT, chunk_BT], 1)
    assert torch.equal(found_BT, text_BT)


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), trained_bpe()], ids=["bytes", "bpe"])
def test_the_auto_tokenizer_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = random_decoder(vocabulary_size=tokenizer.vocabulary_size, qk_norm=False)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path, model, tokenizer))
    for text in (TEXT, " leading", "", "\x00\x7f\u0080\u07ff\uffff\U0010ffff", "a <|endoftext|> b", "ÿ"):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text).tolist()
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == tokenizer.end_of_document
    assert theirs.bos_token_id is None
    assert len(theirs) == tokenizer.vocabulary_size


def test_the_auto_tokenizer_beside_biases_gives_the_same_ids(tmp_path: Path) -> None:
    tokenizer = BytesTokenizer()
    model = random_decoder(vocabulary_size=tokenizer.vocabulary_size, qk_norm=False, qkv_bias=True)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path, model, tokenizer))
    for text in (TEXT, "1234567 of 89", "e\u0301"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()


def test_a_tokenizer_from_elsewhere_puts_no_mark_before_a_text(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = trained_bpe()
    library, _ = tokenizer.as_library_tokenizer()
    library.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.end_of_document)]
    )
    model = random_decoder(vocabulary_size=tokenizer.vocabulary_size, qk_norm=False)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tmp_path, model, tokenizer))
    assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "relu_squared"}, "model.activation=relu_squared"),
        ({"learned_sinks": True}, "model.learned_sinks=true"),
        ({"output_gate": True}, "model.output_gate=true"),
        ({"logit_cap": 30.0}, "model.logit_cap=30.0"),
        ({"final_logit_cap": 30.0}, "model.final_logit_cap=30.0"),
        ({"ngram_embeddings": NgramEmbeddingsConfig()}, "model.ngram_embeddings="),
        ({"value_embeddings": 1}, "model.value_embeddings=1"),
        ({"embedding_residual": True}, "model.embedding_residual=true"),
        ({"short_convolution": 3}, "model.short_convolution=3"),
        ({"attention_sinks": 2}, "model.attention_sinks=2"),
        ({"window": [4, 8]}, r"windows of \[4,8\] keys"),
        ({"window": 1}, "model.window=1"),
        ({"rotary": RotaryConfig(fraction=0.5)}, "model.rotary.fraction=0.5"),
        ({"rotary": [RotaryConfig(base=10.0), RotaryConfig()]}, "rotate in different ways"),
        ({"rotary": [RotaryConfig(), None]}, "rotates in every layer"),
        ({"qkv_bias": True}, "model.qkv_bias=true beside norms"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_reason(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        exported(tmp_path, random_decoder(**changes))
    assert list(tmp_path.iterdir()) == []


def test_sinks_of_a_model_without_windows_hide_nothing() -> None:
    config = ModelConfig(**{**SHAPE, "window": None, "attention_sinks": 4})
    transformers_config(config, vocabulary_size=256, sequence_length=64, end_of_document=255)


def test_a_setting_added_to_the_model_is_expressed_or_refused() -> None:
    """A new field of ModelConfig belongs in one of these places."""
    from dataclasses import fields

    from windowlm.interchange.config_out import _ABSENT_THERE

    expressed = {
        "layers", "dim", "heads", "kv_heads", "head_dim", "feed_forward_dim", "window", "attention_sinks",
        "qk_norm", "qk_norm_epsilon", "qkv_bias", "tied_embeddings", "attention_dropout", "norm_epsilon",
        "rotary",
    }  # fmt: skip
    without_effect_once_trained = {"backend", "zero_output_init", "init_from"}
    known = expressed | set(_ABSENT_THERE) | without_effect_once_trained
    assert {field.name for field in fields(ModelConfig)} == known
    of_rotations = {
        RotaryConfig: {"base", "fraction", "scaling"},
        LinearScaling: {"kind", "factor"},
        NtkScaling: {"kind", "factor"},
        YarnScaling: {
            "kind", "factor", "original_length", "fast", "slow", "truncate", "attention_factor", "mscale",
            "mscale_all_dim",
        },
        Llama3Scaling: {"kind", "factor", "original_length", "fast", "slow"},
    }  # fmt: skip
    for rotation, names in of_rotations.items():
        assert {field.name for field in fields(rotation)} == names


def test_the_folder_holds_the_config_in_the_words_of_all_versions(tmp_path: Path) -> None:
    scaling = LinearScaling(kind="linear", factor=4.0)
    out = exported(tmp_path, random_decoder(**rotated(base=77.0, scaling=scaling)))
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 77.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["sliding_window"] == 8
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["max_position_embeddings"] == 64
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_whoever_reads_one_file_of_the_folder_reads_all(tmp_path: Path) -> None:
    out = exported(tmp_path, random_decoder())
    (tmp_path / "beside").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "beside").stat().st_mode}


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_out_that_exists_is_refused_and_kept(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"^out=.*: it exists"):
        exported(tmp_path, random_decoder())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("windowlm.interchange.export.save_file", full)
    with pytest.raises(UserError, match="cannot be written: no space"):
        exported(tmp_path, random_decoder())
    assert list(tmp_path.iterdir()) == []
