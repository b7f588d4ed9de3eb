"""Models of transformers are scored on the same targets, through our layers or through an adapter."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import run_script
from tests.interchange.foreign import save_foreign
from tests.interchange.models import trained_bpe
from windowlm.bundle import load, load_scorable
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.evaluate import Evaluated, evaluate_checkpoint
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.interchange.adapter import TransformersModel, load_any_causal_model
from windowlm.model.decoder import Decoder
from windowlm.study.config import StudyConfig
from windowlm.study.run_study import run_study
from windowlm.tokenization.transformers_files import write_transformers_files

transformers = pytest.importorskip("transformers")
SMALL = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": 299, "pad_token_id": None}


def save_other(folder: Path, kind: str) -> Any:
    """A random model of an architecture that our layers cannot be."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **SMALL)
        model = transformers.GPT2LMHeadModel(config)
    else:  # scales and caps its logits behind the head
        config = transformers.Gemma2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=48, max_position_embeddings=64, sliding_window=16, final_logit_softcapping=3.0,
            **SMALL,
        )  # fmt: skip
        model = transformers.Gemma2ForCausalLM(config)
    model.eval().save_pretrained(folder)
    write_transformers_files(trained_bpe(), folder)
    return model


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_weights_that_are_missing_or_of_another_shape_are_not_drawn(kind: str, tmp_path: Path) -> None:
    save_other(tmp_path, kind)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("weight") and "mlp" in name)
    for changed, complaint in (
        ({name: weights[name][:, 1:].contiguous()}, "has shape"),
        ({name: None}, "is missing, which config.json asks for"),
    ):
        left = {key: value for key, value in {**weights, **changed}.items() if value is not None}
        save_file(left, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"the weight {name} {complaint}"):
            load_any_causal_model(tmp_path)
    broken = weights[name].clone()
    broken[0, 0] = torch.nan
    save_file({**weights, name: broken}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} holds NaN or infinity"):
        load_any_causal_model(tmp_path)
    further = re.sub(r"\.\d+\.", ".9.", name)
    save_file(
        {**weights, further: weights[name].clone(), "of_another": torch.ones(1)}, file, {"format": "pt"}
    )
    with pytest.raises(UserError, match=rf"the weight {further} is one of more layers than config.json"):
        load_any_causal_model(tmp_path)
    # Such as heads that were left out on purpose.
    save_file({**weights, "of_another": torch.ones(1)}, file, {"format": "pt"})
    load_any_causal_model(tmp_path)


def evaluate(folder: Path, documents: Path, cache: Path, **settings: Any) -> Evaluated:
    return evaluate_checkpoint(
        folder,
        data={"path": str(documents), "cache_dir": str(cache)},
        evaluation=EvaluationConfig(**{"context_lengths": [8, 32], "max_targets": 512, **settings}),
        device="cpu",
    )


@torch.no_grad()
@pytest.mark.parametrize(("kind", "apart"), [("gpt2", True), ("gemma2", False)])
def test_hidden_and_head_give_the_logits(kind: str, apart: bool, tmp_path: Path) -> None:
    theirs = save_other(tmp_path, kind)
    model = load_any_causal_model(tmp_path)
    tokens_BT = torch.randint(300, (2, 50))
    torch.testing.assert_close(model.head(model.hidden(tokens_BT)), theirs(tokens_BT).logits)
    assert (model.hidden(tokens_BT).shape[-1] == 32) is apart


def test_a_model_that_sees_what_comes_is_refused(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=66, **{**SMALL, "pad_token_id": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    for reads_forward in (False, True):
        config.is_decoder = reads_forward
        transformers.RobertaForCausalLM(config).eval().save_pretrained(tmp_path)
        if reads_forward:
            assert load_any_causal_model(tmp_path).model_type == "roberta"
        else:
            with pytest.raises(UserError, match="this roberta sees tokens that come later"):
                load_any_causal_model(tmp_path)


def test_both_ways_score_the_same_targets_alike(tmp_path: Path, documents: Path) -> None:
    save_foreign(tmp_path / "ours", "mistral")
    through_layers = evaluate(tmp_path / "ours", documents, tmp_path / "cache")
    assert isinstance(through_layers.bundle.model, Decoder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    adapted = TransformersModel(theirs.eval())
    result, targets, _ = length_sweep(
        adapted,
        through_layers.documents,
        through_layers.bundle.tokenizer.token_bytes_V,
        through_layers.evaluation,
        {key: through_layers.result[key] for key in FACTS},  # type: ignore[arg-type, literal-required]
    )
    assert targets.hash == through_layers.result["targets_hash"]
    for row, other in zip(result["rows"], through_layers.result["rows"], strict=True):
        assert row["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-5)
        assert row["naive_bits_per_byte"] == pytest.approx(other["naive_bits_per_byte"], abs=1e-5)


FACTS = (
    "training_length",
    "window",
    "receptive_field",
    "tokens_trained",
    "tokenizer_identity",
    "source_identity",
    "split",
)


def test_another_architecture_is_reported_like_a_run(tmp_path: Path, documents: Path) -> None:
    save_other(tmp_path / "gpt2", "gpt2")
    evaluated = evaluate(tmp_path / "gpt2", documents, tmp_path / "cache")
    names = {path.name for path in evaluated.folder.iterdir()}
    assert {"length.json", "length.csv", "length.png", "report.html", "losses.parquet"} <= names
    assert evaluated.folder.parent == tmp_path / "gpt2"
    result = json.loads((evaluated.folder / "length.json").read_text())
    assert result["window"] == "attention of gpt2"
    assert result["training_length"] == 64
    assert [row["extrapolation"] for row in result["rows"]] == [False, False]
    assert "attention of gpt2" in (evaluated.folder / "report.html").read_text()
    useful, probed = run_study(evaluated, StudyConfig(measures=["useful_reach", "reach"]))
    assert useful["rows"][0]["windows_1_5"] is None
    assert probed["rows"][0]["tokens_probed"] == probed["rows"][0]["by_gradient"] == 64


def test_what_it_cannot_do_is_said(tmp_path: Path, documents: Path) -> None:
    save_other(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match=r"windows of 127 tokens, and this gpt2 has 64 positions"):
        evaluate(tmp_path / "gpt2", documents, tmp_path / "cache", context_lengths=[64])
    with pytest.raises(UserError, match=r"others trained it, .* data.path=FILE"):
        evaluate_checkpoint(tmp_path / "gpt2", data={}, evaluation=EvaluationConfig())
    with pytest.raises(UserError, match="model_type=gpt2: our layers can be llama"):
        load(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "config.json"
    path.write_text(path.read_text().replace('"gpt2"', '"none_such"'))
    with pytest.raises(UserError, match=r"^checkpoint=.*transformers cannot open it"):
        load_scorable(tmp_path / "gpt2")


# Ours blends between two different wavelengths.
ONE_WAVELENGTH = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": ONE_WAVELENGTH},
    ],
)
def test_what_our_layers_cannot_be_is_scored_as_transformers_computes_it(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = tmp_path / "model"
    save_foreign(folder, "llama")
    path = folder / "config.json"
    stated = json.loads(path.read_text())
    if "rope_scaling" in changes:
        stated.pop("rope_parameters", None)
    path.write_text(json.dumps({**stated, **changes}))
    with pytest.raises(UserError, match=r"our layers have|rope_type=dynamic"):
        load(folder)
    found = load_scorable(folder)
    assert isinstance(found.model, TransformersModel)
    assert found.window == "attention of llama"


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows_is_refused(tmp_path: Path) -> None:
    # Its config.json keeps the size inside another object.
    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 16, "intermediate_size": 48, "vocab_size": trained_bpe().vocabulary_size - 1,
    }  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    write_transformers_files(trained_bpe(), tmp_path)
    with pytest.raises(UserError, match=r"its tokenizer has \d+ tokens and the model's embedding"):
        load_scorable(tmp_path)


def test_a_model_of_the_hub_has_its_results_among_the_runs(
    tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_foreign(tmp_path / "snapshot", "qwen3")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **patterns: "snapshot")
    evaluated = evaluate(Path("owner/name"), documents, tmp_path / "cache")
    assert evaluated.folder.parent == Path("runs/owner--name")
    assert {path.name for path in (tmp_path / "snapshot").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


def test_the_script_takes_a_folder_of_transformers(tmp_path: Path, documents: Path) -> None:
    save_foreign(tmp_path / "model", "smollm3 with windows")
    done = run_script(
        *("scripts/evaluate.py", "checkpoint=model", f"data.path={documents}", "data.cache_dir=cache"),
        *("evaluation.context_lengths=[8,16]", "evaluation.max_targets=256"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "bits/byte" in done.stdout
    refused = run_script("scripts/evaluate.py", "checkpoint=model", cwd=tmp_path)
    assert refused.returncode == 2
    assert "others trained it" in refused.stderr
