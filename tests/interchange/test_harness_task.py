"""lm-evaluation-harness and our naive figure agree on an exported model."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_script
from tests.interchange.models import TEXT, random_decoder, trained_bpe
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.evaluate import evaluate_checkpoint
from windowlm.interchange.export import export_to_transformers
from windowlm.interchange.harness_task import TASK, write_harness_task
from windowlm.tokenization.tokenizer import BytesTokenizer, Tokenizer

TOKENIZERS = [BytesTokenizer(), trained_bpe()]
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe"])


@each_tokenizer
@pytest.mark.parametrize("context_length", [1, 7, 32])
def test_the_targets_are_whole_windows_behind_one_context(
    tokenizer: Tokenizer, context_length: int, tmp_path: Path
) -> None:
    task = write_harness_task(tokenizer, TEXT, context_length, tmp_path / "task")
    whole = tokenizer.encode(task.text.read_bytes().decode())
    targets = tokenizer.encode(json.loads((task.folder / "targets.jsonl").read_text())["targets"])
    assert len(targets) == task.targets
    assert task.targets % context_length == 0
    assert len(whole) == context_length + task.targets
    assert np.array_equal(whole[context_length:], targets)
    assert whole[context_length - 1] == task.prefix_token


def test_a_text_that_is_too_short_or_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"context_length=9: the text has 5 tokens"):
        write_harness_task(BytesTokenizer(), "short", 9, tmp_path / "task")
    assert not (tmp_path / "task").exists()
    with pytest.raises(UserError, match=r"^out=.*: File exists"):
        write_harness_task(BytesTokenizer(), TEXT, 9, tmp_path)


@pytest.mark.parametrize("name", ["text.txt", "targets.jsonl", f"{TASK}.yaml"])
def test_a_full_disk_leaves_no_folder_and_names_the_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, content: bytes, **options: Path) -> None:
        path.write_bytes(content[:5])
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("windowlm.interchange.harness_task.write_atomically", write)
    with pytest.raises(UserError, match=rf"out=.*{name} cannot be written: No space left on device"):
        write_harness_task(BytesTokenizer(), TEXT, 9, tmp_path / "task")
    assert not (tmp_path / "task").exists()


@each_tokenizer
def test_the_harness_gives_our_naive_figure(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("transformers")
    from lm_eval.tasks import TaskManager

    model = random_decoder(vocabulary_size=tokenizer.vocabulary_size, window=[8, None])
    out = tmp_path / "out"
    export_to_transformers(model, tokenizer, out, sequence_length=64, card="")
    task = write_harness_task(tokenizer, TEXT, 32, tmp_path / "task")
    evaluated = evaluate_checkpoint(
        out,
        data={"path": str(task.text), "cache_dir": str(tmp_path / "cache")},
        evaluation=EvaluationConfig(context_lengths=[32], max_targets=None),
        device="cpu",
    )
    row = evaluated.result["rows"][0]
    assert row["targets"] == task.targets
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={out},dtype=float32,max_length=32,prefix_token_id={task.prefix_token}",
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(task.folder), include_defaults=False),
        device="cpu",
        batch_size=8,
        bootstrap_iters=0,
    )
    theirs = found["results"][TASK]["bits_per_byte,none"]
    assert abs(theirs - row["naive_bits_per_byte"]) < 1e-6


def test_the_script_says_both_commands(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    export_to_transformers(random_decoder(), BytesTokenizer(), tmp_path / "out", sequence_length=64, card="")
    (tmp_path / "book.txt").write_bytes(TEXT.encode())
    done = run_script("scripts/harness_task.py", "out", "book.txt", "16", "task", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "scripts/evaluate.py checkpoint=out data.path=task/text.txt" in done.stdout
    assert "pretrained=out,dtype=float32,max_length=16,prefix_token_id=" in done.stdout
    again = run_script("scripts/harness_task.py", "out", "book.txt", "16", "task", cwd=tmp_path)
    assert again.returncode == 2
    assert "File exists" in again.stderr


def test_a_folder_whose_name_the_harness_would_cut_is_refused(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(TEXT.encode())
    export_to_transformers(random_decoder(), BytesTokenizer(), tmp_path / "a,b", sequence_length=64, card="")
    done = run_script("scripts/harness_task.py", "a,b", "book.txt", "16", "task", cwd=tmp_path)
    assert done.returncode == 2
    assert "rename the folder" in done.stderr
    assert not (tmp_path / "task").exists()
