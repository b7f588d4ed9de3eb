"""A finished run is scored and its files are written, with a real decoder and real documents."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from windowlm.bundle import save_bundle
from windowlm.data.config import DataConfig
from windowlm.data.token_store import prepare_tokens
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.evaluate import evaluate_checkpoint
from windowlm.evaluation.result_files import read_result
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.tokenization.config import TokenizerConfig

# Reach of two layers: 1 + 2 * (4 - 1) = 7 tokens.
SHAPE = {
    "layers": 2,
    "dim": 16,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "feed_forward_dim": 24,
    "window": 4,
}


@pytest.fixture
def run(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        words = generator.choice(["größe", "漢字", "window", "a", "of", "text"], size=60)
        (texts / f"{number}.txt").write_text(" ".join(words))
    data = DataConfig(
        name="text",
        path=str(texts),
        sequence_length=32,
        cache_dir=str(tmp_path / "cache"),
        validation_fraction=0.3,
    )
    prepared = prepare_tokens(data, TokenizerConfig(kind="bytes"))
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SHAPE), 256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    config = {
        "model": asdict(model.config),
        "vocabulary_size": 256,
        "sequence_length": 32,
        "source_identity": prepared.source_identity,
        "tokenizer_identity": prepared.tokenizer.identity,
        "data": asdict(data),
        "tokenizer": {"kind": "bytes"},
        "training": {"tokens_trained": 123},
    }
    folder = tmp_path / "run"
    save_bundle(folder / "model", model.state_dict(), config, prepared.tokenizer)
    return folder


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """The plot has tests of its own and takes a second."""
    plots = []
    monkeypatch.setattr("windowlm.evaluation.evaluate.html_page", lambda *_: b"page")
    monkeypatch.setattr(
        "windowlm.evaluation.evaluate.length_plot", lambda result: plots.append(result) or b"plot"
    )
    return plots


def evaluate(run, **settings):
    options = {"data": {}, "evaluation": EvaluationConfig(context_lengths=[4, 8, 16]), "device": "cpu"}
    return evaluate_checkpoint(run, **(options | settings)).result


def test_the_runs_own_split_goes_into_its_folder(run, drawn, capsys):
    result = evaluate(run)
    assert drawn == [result]
    assert (run / "evaluation" / "length.png").read_bytes() == b"plot"
    assert read_result(run) == result
    assert {path.name for path in (run / "evaluation").iterdir()} == {
        "length.json",
        "length.csv",
        "length.png",
        "targets.json",
        "losses.parquet",
        "report.html",
    }
    assert result["split"] == "validation"
    assert (result["tokens_trained"], result["training_length"], result["window"]) == (123, 32, 4)
    assert result["receptive_field"] == 7
    assert result["parameters"] == sum(p.numel() for p in Decoder(ModelConfig(**SHAPE), 256).parameters())
    printed = capsys.readouterr().out
    assert f"{result['rows'][0]['bits_per_byte']:.4f}" in printed
    assert str(run / "evaluation") in printed.replace("\n", "")


def test_a_real_windowed_decoder_does_not_change_beyond_its_receptive_field(run):
    evaluation = EvaluationConfig(context_lengths=[6, 7, 16], precision="64-true")
    nats = {row["context_length"]: row["nats"] for row in evaluate(run, evaluation=evaluation)["rows"]}
    # The rotation's tables are float32, so relative positions agree to about 1e-7 of a logit.
    assert nats[7] == pytest.approx(nats[16], rel=1e-6)
    assert abs(nats[6] - nats[16]) > 1e-4 * nats[16]


def test_a_path_is_scored_whole_in_a_folder_of_its_own(run, tmp_path, capsys):
    own = evaluate(run)
    book = tmp_path / "one, book.txt"
    book.write_text("größer " * 40)
    result = evaluate(run, data={"path": str(book)}, evaluation=EvaluationConfig(context_lengths=[16]))
    size = len(book.read_bytes())
    assert (result["rows"][0]["targets"], result["rows"][0]["bytes"]) == (size - 16, size - 16)
    assert result["split"] == "all"
    assert read_result(run) == own
    assert read_result(run, "evaluation_one_book") == result
    assert f"results in {run / 'evaluation_one_book'}\n" in capsys.readouterr().out


def test_an_earlier_result_is_kept_and_named_for_a_shell(run, tmp_path, capsys):
    own = evaluate(run, output_dir=tmp_path / "[a] b")
    shorter = evaluate(run, output_dir=tmp_path / "[a] b", evaluation=EvaluationConfig(context_lengths=[16]))
    assert shorter != own
    assert json.loads((tmp_path / "[a] b" / "earlier" / "001" / "length.json").read_text()) == own
    printed = capsys.readouterr().out
    assert f"the earlier result is kept in '{tmp_path}/[a] b/earlier/001'\n" in printed
    assert f"results in '{tmp_path}/[a] b'\n" in printed


def test_an_output_folder_leaves_the_runs_folder_alone(run, tmp_path):
    evaluate(run, output_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "length.json").is_file()
    assert not (run / "evaluation").exists()


@pytest.mark.parametrize("name", ["file", "file/inside"])
def test_an_output_folder_that_cannot_be_is_refused_before_the_work(run, tmp_path, monkeypatch, name):
    (tmp_path / "file").touch()
    monkeypatch.setattr("windowlm.evaluation.evaluate.length_sweep", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(UserError, match=r"^output_dir=.*file is a file"):
        evaluate(run, output_dir=tmp_path / name)


def test_a_second_evaluation_gives_the_same_file_to_the_bit(run):
    evaluate(run)
    first = (run / "evaluation" / "length.json").read_bytes()
    evaluate(run)
    assert (run / "evaluation" / "length.json").read_bytes() == first
    assert not (run / "evaluation" / "earlier").exists()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_lower_precision_is_near_and_not_equal(run, precision):
    exact = evaluate(run)["rows"][-1]["bits_per_byte"]
    rough = evaluate(run, evaluation=EvaluationConfig(context_lengths=[4, 8, 16], precision=precision))
    assert rough["precision"] == precision
    assert rough["rows"][-1]["bits_per_byte"] != exact
    assert rough["rows"][-1]["bits_per_byte"] == pytest.approx(exact, rel=0.02)


def test_lengths_beyond_the_documents_leave_the_earlier_result(run):
    own = evaluate(run)
    with pytest.raises(UserError, match=r"^evaluation\.context_lengths=\[100000\]"):
        evaluate(run, evaluation=EvaluationConfig(context_lengths=[100_000]))
    assert read_result(run) == own


def test_an_unknown_device_is_named(run):
    with pytest.raises(UserError, match=r"^device=abacus: "):
        evaluate(run, device="abacus")


def test_a_tokenizer_that_is_not_the_trainings_is_refused(run):
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_identity": "another"}))
    with pytest.raises(UserError, match=r"^checkpoint=.*the tokenizer there is not that of its training"):
        evaluate(run)
    assert not (run / "evaluation").exists()


def test_a_damaged_earlier_result_is_kept_and_not_overwritten(run):
    (run / "evaluation").mkdir()
    (run / "evaluation" / "length.json").write_text("{")
    evaluate(run)
    assert (run / "evaluation" / "earlier" / "001" / "length.json").read_text() == "{"
    assert read_result(run)["rows"]


def test_the_targets_of_another_evaluation_are_scored_again(run, tmp_path):
    first = evaluate(run, evaluation=EvaluationConfig(context_lengths=[8, 16], max_targets=200))
    targets = str(run / "evaluation" / "targets.json")
    confined = EvaluationConfig(context_lengths=[4, 8], max_targets=None, targets=targets)
    again = evaluate(run, evaluation=confined, output_dir=tmp_path / "again")
    assert again["targets_hash"] == again["targets_within"] == first["targets_hash"]
    assert first["targets_within"] is None
    assert again["rows"][1]["nats"] == pytest.approx(first["rows"][0]["nats"], rel=1e-6)
