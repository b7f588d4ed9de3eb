"""The screen before step one."""

import json
from pathlib import Path

import torch
from rich.console import Console

from tests.data.corpus import prepare, text, write_documents
from windowlm.attention.config import RotaryConfig
from windowlm.config import TrainConfig
from windowlm.data.config import DataConfig
from windowlm.model.config import ModelConfig, NgramEmbeddingsConfig
from windowlm.model.cost import model_cost
from windowlm.parallel.config import ParallelConfig
from windowlm.training.calibration import Calibration
from windowlm.training.config import TrainerConfig
from windowlm.training.plan import Plan, plan_table
from windowlm.training.schedule import Budget


def printed(
    tmp_path: Path,
    folder: str,
    run_dir: str,
    model: ModelConfig | None = None,
    processes: int = 1,
    parallel: ParallelConfig | None = None,
    **data: object,
) -> str:
    path = tmp_path / folder
    write_documents(path, 10)
    config = TrainConfig(
        run_dir=run_dir,
        model=model or ModelConfig(),
        data=DataConfig(name="text", path=str(path), sequence_length=16),
        trainer=TrainerConfig(max_steps=5),
        parallel=parallel or ParallelConfig(),
    )
    plan = Plan(
        config=config,
        cost=model_cost(config.model, 256, 16, 4),
        data=prepare(path, tmp_path / "cache", **data),
        device=torch.device("cpu"),
        calibration=Calibration(seconds_per_batch=0.1, forward_seconds=0.05, memory_bytes=1 << 20),
        budget=Budget.of(config.trainer),
        run_dir=Path(run_dir),
        processes=processes,
    )
    console = Console(width=400)
    with console.capture() as capture:
        console.print(plan_table(plan))
    return capture.get()


def test_names_from_outside_are_shown_to_the_letter_and_quoted_for_a_shell(tmp_path: Path) -> None:
    shown = printed(tmp_path, "[/red] :smile:", "runs/[a] b")
    assert "[/red] :smile:" in shown
    assert "'runs/[a] b'" in shown


def test_it_says_what_processes_share_and_that_one_alone_shares_nothing(tmp_path: Path) -> None:
    assert "processes    " not in printed(tmp_path, "docs", "run")
    alone = printed(tmp_path, "docs", "run", parallel=ParallelConfig(kind="context"))
    assert "one alone, so that parallel=context shares nothing" in alone
    for parallel, said in (
        (ParallelConfig(), "4 share rows of the batch"),
        (ParallelConfig(kind="fsdp2"), "4 share rows of the batch and the model"),
        (ParallelConfig(kind="context", context_processes=2), "4 share each sequence among 2"),
        (
            ParallelConfig(kind="context", context_processes=1),
            "4 share rows of the batch, and cut no sequence",
        ),
        (
            ParallelConfig(kind="context", context_shares=(1.0, 1.0, 1.0, 2.0)),
            "each sequence among 4, in parts of 3, 3, 3, 7 tokens",
        ),
    ):
        assert said in printed(tmp_path, "docs", "run", processes=4, parallel=parallel)


def test_left_out_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"title": "003.txt"}, {"title": "004.txt"}]))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "copy.txt").write_text(text(5), encoding="utf-8")
    shown = printed(tmp_path, "docs", "run", exclude=str(tmp_path / "list.json"))
    assert "1 duplicates dropped; 2 left out by data.exclude" in shown
    (tmp_path / "list.json").write_text(json.dumps([{"title": "no such title"}]))
    shown = printed(tmp_path, "docs", "run", exclude=str(tmp_path / "list.json"))
    assert "; 0 left out by data.exclude" in shown
    assert "data.exclude" not in printed(tmp_path, "docs", "run")


def test_the_options_of_the_attention_are_named_where_they_are_set(tmp_path: Path) -> None:
    assert "window 256; receptive field 1,021 tokens" in printed(tmp_path, "plain", "run")
    model = ModelConfig(
        window=8,
        attention_sinks=4,
        learned_sinks=True,
        output_gate=True,
        logit_cap=30.0,
        rotary=[RotaryConfig(base=1e6), None],
    )
    assert (
        "window 8; 4 sinks; learned sinks; output gate; logit cap 30.0; "
        "rotary base 1,000,000 none 1,000,000 none (by layer); receptive field 33 tokens"
    ) in printed(tmp_path, "all", "run", model)
    assert "window 256; rotary base none;" in printed(tmp_path, "none", "run", ModelConfig(rotary=None))


def test_what_the_model_has_besides_the_plain_decoder_is_named(tmp_path: Path) -> None:
    plain = model_cost(ModelConfig(), 256, 16, 4).parameters
    assert f"MLP 352; {plain:,} parameters" in printed(tmp_path, "plain", "run")
    model = ModelConfig(
        ngram_embeddings=NgramEmbeddingsConfig(orders=[2, 4], buckets=1000, dim=16),
        value_embeddings=1,
        embedding_residual=True,
        short_convolution=4,
        final_logit_cap=15.0,
        zero_output_init=True,
    )
    added = model_cost(model, 256, 16, 4).parameters
    assert "MLP 352 with ReLU squared;" in printed(
        tmp_path, "two", "run", ModelConfig(activation="relu_squared")
    )
    assert (
        f"MLP 352; n-grams of 2, 4 in 1,000 rows each of 16; value embeddings 1; "
        "embedding residual; short convolution 4; final logit cap 15.0; "
        f"outputs from zero; {added:,} parameters"
    ) in printed(tmp_path, "all", "run", model)
