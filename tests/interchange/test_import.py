"""Folders of Llama, Mistral, Qwen2, Qwen3 and SmolLM3 open in our model and give the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.interchange.foreign import FOREIGN, foreign_model, save_foreign
from tests.interchange.models import SHAPE, TEXT, random_decoder, trained_bpe
from tests.interchange.test_export import MODELS
from windowlm import generate, load
from windowlm.attention.config import RotaryConfig
from windowlm.bundle import load_scorable
from windowlm.errors import UserError
from windowlm.export_run import export_run
from windowlm.generation.config import SamplingConfig
from windowlm.generation.generate import Generator
from windowlm.interchange.adapter import TransformersModel
from windowlm.interchange.export import export_to_transformers
from windowlm.interchange.model_card import model_card
from windowlm.model.config import ModelConfig
from windowlm.tokenization.tokenizer import BytesTokenizer
from windowlm.tokenization.transformers_files import write_transformers_files

transformers = pytest.importorskip("transformers")
TOKENS = 100
MARK = "<|endoftext|>"


@torch.no_grad()
@pytest.mark.parametrize("name", FOREIGN)
def test_logits_agree_beyond_the_window(name: str, tmp_path: Path) -> None:
    theirs = save_foreign(tmp_path, name)
    ours = load(tmp_path)
    tokens_BT = torch.randint(300, (2, TOKENS))
    torch.testing.assert_close(ours.model(tokens_BT), theirs(tokens_BT).logits, atol=1e-4, rtol=0)
    assert ours.model.config.window == FOREIGN[name][2]
    assert ours.config["sequence_length"] == 64


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral", "qwen2 with windows", "smollm3 with windows"])
def test_greedy_tokens_agree(name: str, tmp_path: Path) -> None:
    theirs = save_foreign(tmp_path, name)
    ours = load(tmp_path)
    prompt = "def window"
    mine = generate(ours, prompt, max_new_tokens=60, temperature=0.0, stop_at_end=False, beyond_training=True)
    start_BT = torch.from_numpy(ours.tokenizer.encode(prompt).astype("int64"))[None]
    found_BT = theirs.generate(start_BT, max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert mine.tokens == found_BT[0, start_BT.shape[1] :].tolist()


def test_the_card_says_what_is_known_of_the_training_of_others(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    save_foreign(folder, "llama")
    loaded = load(folder)
    theirs = model_card("theirs", loaded.model.config, loaded.config, None)
    assert not any(word in theirs for word in ("raining", "unknown", "document"))
    assert f"| positions | {loaded.config['sequence_length']:,} tokens |" in theirs

    from_theirs = ModelConfig(**{**SHAPE, "init_from": "theirs"})
    facts = {**loaded.config, "training": {"steps_trained": 2}, "source_identity": "source"}
    card = model_card("ours", from_theirs, facts, None)
    assert "| began from the weights of | theirs |" in card
    assert "| steps | 2 |" in card
    assert "In training a document had no mark before its first token" in card


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_what_was_exported_comes_back(name: str, tmp_path: Path) -> None:
    model = random_decoder(**MODELS[name][0])
    out = tmp_path / "out"
    export_to_transformers(model, BytesTokenizer(), out, sequence_length=64, card="")
    back = load(out)
    tokens_BT = torch.randint(255, (1, TOKENS))
    torch.testing.assert_close(back.model(tokens_BT), model(tokens_BT), atol=1e-4, rtol=0)
    assert isinstance(back.tokenizer, BytesTokenizer)
    assert back.model.config.layer_windows() == model.config.layer_windows()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "smollm3 with windows"])
def test_biases_are_read_where_that_of_the_output_is_zero(name: str, tmp_path: Path) -> None:
    theirs = foreign_model(name, attention_bias=True)
    write_transformers_files(trained_bpe(), tmp_path)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"o_proj\.bias is not zero, and our layers have no such bias"):
        load(tmp_path)
    tokens_BT = torch.randint(300, (2, TOKENS))
    scored = load_scorable(tmp_path).model
    assert isinstance(scored, TransformersModel)
    logits_BTV = scored.head(scored.hidden(tokens_BT))
    torch.testing.assert_close(logits_BTV, theirs(tokens_BT).logits, atol=1e-4, rtol=0)
    for layer in theirs.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path).model(tokens_BT), theirs(tokens_BT).logits, atol=1e-4, rtol=0)


def test_all_ends_of_a_model_end_production_and_go_out_again(tmp_path: Path) -> None:
    save_foreign(tmp_path / "in", "llama")
    stated = tmp_path / "in" / "generation_config.json"
    stated.write_text(json.dumps({"eos_token_id": [299, 7, 260, -1]}))
    bundle = load(tmp_path / "in")
    assert bundle.config["end_marks"] == [7, 260, 299]
    settings = SamplingConfig(max_new_tokens=400, temperature=2.0, beyond_training=True)
    results = Generator(bundle, settings).batch(["abc"] * 8)
    assert {result.ended_by for result in results} == {"end_of_document"}
    assert {result.tokens[-1] for result in results} <= {7, 260, 299}
    assert len({result.tokens[-1] for result in results}) > 1
    assert not any({7, 260, 299} & set(result.tokens[:-1]) for result in results)
    export_run(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [299, 7, 260]
    assert load(tmp_path / "out").config["end_marks"] == [7, 260, 299]
    stated.write_text('{"eos_token_id": "end"}')
    with pytest.raises(
        UserError, match=r"generation_config.json: eos_token_id='end': a whole number, a list"
    ):
        load(tmp_path / "in")


@torch.no_grad()
def test_shards_and_half_precision_are_read(tmp_path: Path) -> None:
    theirs = save_foreign(tmp_path / "whole", "qwen3").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    (tmp_path / "whole" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "whole").glob("model-*.safetensors"))) > 2
    ours = load(tmp_path / "whole")
    assert {parameter.dtype for parameter in ours.model.parameters()} == {torch.float32}
    tokens_BT = torch.randint(300, (1, TOKENS))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    expected = again(tokens_BT).logits
    torch.testing.assert_close(ours.model(tokens_BT), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_embedding_with_more_rows_than_tokens_keeps_them(tmp_path: Path) -> None:
    theirs = save_foreign(tmp_path, "llama", vocabulary_size=320)
    ours = load(tmp_path)
    tokens_BT = torch.randint(300, (1, 20))
    assert ours.model(tokens_BT).shape == theirs(tokens_BT).logits.shape == (1, 20, 320)
    assert ours.tokenizer.vocabulary_size == 320
    assert ours.tokenizer.decode_bytes([319]) == b""
    ours.tokenizer.save(tmp_path / "again")
    assert type(ours.tokenizer).load(tmp_path / "again").vocabulary_size == 320


def test_the_names_of_old_versions_are_read(tmp_path: Path) -> None:
    save_foreign(tmp_path, "llama")
    edit(tmp_path, lambda c: c.pop("rope_parameters", None))
    edit(tmp_path, lambda c: c.update(rope_theta=77.0, rope_scaling={"type": "linear", "factor": 2.0}))
    rotary = load(tmp_path).model.config.rotary
    assert isinstance(rotary, RotaryConfig)
    assert rotary.base == 77.0
    assert rotary.scaling is not None
    assert rotary.scaling.kind == "linear"


def test_the_tokenizer_of_a_folder_is_that_of_transformers(tmp_path: Path) -> None:
    save_foreign(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "NFC"}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": MARK, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {MARK: {"id": MARK, "ids": [299], "tokens": [MARK]}},
    }
    path.write_text(json.dumps(content))
    ours = load(tmp_path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    composed = TEXT.replace("e\u0301", "é")
    assert ours.encode(composed).tolist() == theirs.encode(composed, add_special_tokens=False)
    assert ours.decode(ours.encode(TEXT)) == TEXT


def edit(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder, lambda c: c.update(changes))


def weight(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        changed = change(state.pop(name))
        save_file(state if changed is None else {**state, name: changed}, folder / "model.safetensors")

    return apply


def shards(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model-00001-of-00002.safetensors")
    names = dict.fromkeys(state, "model-00001-of-00002.safetensors")
    names["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def other_tokenizer(folder: Path) -> None:
    edit(folder, lambda c: c["model"]["vocab"].update(more=300, still=301), "tokenizer.json")


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[3] = float("nan")
    return tensor


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another architecture": ("llama", config(model_type="gpt2"), "model_type=gpt2: our layers can be llama"),
    "an unknown one": ("llama", config(model_type="none"), "model_type=none: our layers"),
    "biases that are missing": ("llama", config(attention_bias=True), "q_proj.bias is missing"),
    "biases beside norms": ("qwen3", config(attention_bias=True), "attention_bias=True"),
    "layers as a text": ("llama", config(num_hidden_layers="4"), "num_hidden_layers='4': whole numbers"),
    "no heads": ("llama", config(num_attention_heads=0), "num_attention_heads=0: whole numbers from 1"),
    "bias of the MLP": ("smollm3", config(mlp_bias=True), "mlp_bias=True"),
    "another activation": ("qwen3", config(hidden_act="gelu"), "hidden_act=gelu"),
    "a part of the head": (
        "llama",
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "partial_rotary_factor=0.5",
    ),
    "dynamic rotation": (
        "llama",
        config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope_type=dynamic",
    ),
    "part of yarn": (
        "qwen3, yarn",
        config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "wings": 0.7,
                                "original_max_position_embeddings": 32}),
        "wings is not read beside yarn",
    ),
    "sliding layers without a window": (
        "qwen3",
        config(layer_types=["sliding_attention"] * 4),
        "layer_types has sliding_attention beside use_sliding_window=False",
    ),
    "kinds of too few layers": ("qwen2", config(layer_types=["full_attention"]), "layer_types|layers"),
    "quantised": ("llama", config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization"),
    "heads that do not divide": ("mistral", config(num_key_value_heads=3), "kv_heads=3"),
    "no positions": ("llama", config(max_position_embeddings=-1), "max_position_embeddings=-1"),
    "text for a number": ("llama", config(hidden_size="wide"), "config.json"),
    "no config": ("llama", without("config.json"), "is missing"),
    "config that is no JSON": (
        "llama", lambda folder: (folder / "config.json").write_text("{"), "not JSON|is missing"
    ),
    "no weights": ("llama", without("model.safetensors"), "neither model.safetensors nor"),
    "a missing shard": ("llama", shards, "model-00002-of-00002.safetensors: one of 2 shards is missing"),
    "an index of nothing": (
        "llama",
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "x.safetensors"),
            (folder / "model.safetensors.index.json").write_text("[1]"),
        ),
        "not an index of shards",
    ),
    "a damaged file": (
        "llama", lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "not a readable"
    ),
    "a wrong shape": ("llama", weight(Q_PROJ, lambda w: w[:5].clone()), r"q_proj.weight has shape \[5, 32\]"),
    "a missing weight": ("llama", weight(Q_PROJ, lambda w: None), "q_proj.weight is missing"),
    "an unknown weight": ("qwen2", config(model_type="llama"), "has no weight model.layers.0.self_attn"),
    "weights of more layers": ("llama", config(num_hidden_layers=3), "of 4 layers and config.json asks"),
    "more layers than can be": ("llama", config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "a size that fits nowhere": ("llama", config(intermediate_size=10**15), "must be at most 16777216"),
    "fewer rows than one": ("llama", config(vocab_size=-1), "vocab_size=-1: whole numbers from 1 on"),
    "rows that fit nowhere": ("llama", config(vocab_size=10**12), "and config.json asks for"),
    "a weight of whole numbers": (
        "llama", weight(Q_PROJ, lambda w: w.to(torch.int8)), "q_proj.weight holds int8: float64, float32"
    ),
    "a weight of eight bits": (
        "llama", weight(Q_PROJ, lambda w: w.to(torch.float8_e4m3fn)), "q_proj.weight holds float8_e4m3fn"
    ),
    "a weight beyond float32": ("llama", weight(Q_PROJ, lambda w: w.double() * 1e300), "more than float32"),
    "a weight that is NaN": ("llama", weight(Q_PROJ, nan), "q_proj.weight holds NaN"),
    "two heads": (
        "llama, tied, own head size",
        lambda folder: save_file(
            {**(state := load_file(folder / "model.safetensors")),
             "lm_head.weight": state["model.embed_tokens.weight"] + 1},
            folder / "model.safetensors",
        ),
        "differs from the embedding",
    ),
    "no tokenizer": ("llama", without("tokenizer.json"), "tokenizer.json is missing"),
    "tokenizer of another model": ("llama", other_tokenizer, "302 tokens and the embedding of config"),
    "tokenizer without an end mark": (
        "llama",
        lambda folder: (
            without("tokenizer_config.json")(folder), edit(folder, lambda c: c.pop("eos_token_id"))
        ),
        "no end mark",
    ),
    "tokenizer that changes text": (
        "llama",
        lambda folder: edit(folder, lambda c: c.update(normalizer={"type": "Lowercase"}), "tokenizer.json"),
        "normalizer Lowercase changes the text",
    ),
    "damaged tokenizer": (
        "llama", lambda folder: (folder / "tokenizer.json").write_text('{"a": 1}'), "not a tokenizer's file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_read_is_explained(name: str, tmp_path: Path) -> None:
    foreign, spoil, said = BAD[name]
    save_foreign(tmp_path, foreign)
    spoil(tmp_path)
    with pytest.raises(UserError, match=said):
        load(tmp_path)


def test_without_transformers_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    save_foreign(tmp_path, "llama")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'windowlm\[transformers\]'"):
        load(tmp_path)


def test_the_ids_of_the_tests_are_those_of_the_tokenizer() -> None:
    assert trained_bpe().vocabulary_size == 300
    assert trained_bpe().end_of_document == 299
