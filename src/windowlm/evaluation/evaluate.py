"""The evaluation as a run and ``scripts/evaluate.py`` call it: score, write the files, return the result."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from windowlm.bundle import MODEL_FOLDER, device_named, load
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.report import length_plot, length_table
from windowlm.evaluation.result import LengthResult, RunFacts
from windowlm.evaluation.result_files import evaluation_name, write_results
from windowlm.evaluation.scored_documents import scored_documents
from windowlm.evaluation.targets import Documents


def evaluate_model(
    model: nn.Module,
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    evaluation: EvaluationConfig,
    facts: RunFacts,
    folder: Path,
) -> tuple[LengthResult, Path | None]:
    """Score a model on its device, with a progress bar on a terminal, and write the result.

    Args:
        model: a ``Decoder``; it is not changed.
        documents: the split.
        token_bytes_V: UTF-8 bytes that each token stands for.
        evaluation: context lengths, budget and precision.
        facts: what the result says about the run.
        folder: gets ``length.json``, ``length.csv``, ``length.png`` and ``targets.json``.

    Returns:
        The result, and where a different one that ``folder`` held was moved, or None.

    Raises:
        UserError: no document is long enough, or the model cannot be scored.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_interactive) as progress:
        task = progress.add_task("perplexity by context length", total=None)
        result, targets = length_sweep(
            model,
            documents,
            token_bytes_V,
            evaluation,
            facts,
            on_progress=lambda read, total: progress.update(task, completed=read, total=total),
        )
    return result, write_results(folder, result, targets, length_plot(result))


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    data: Mapping[str, Any],
    evaluation: EvaluationConfig,
    device: str = "auto",
    output_dir: Path | None = None,
) -> LengthResult:
    """Score a finished run, print its table and say where the files are.

    Args:
        checkpoint: a run's folder or its model folder.
        data: settings of the documents. With ``path`` or ``name`` all documents there are scored, otherwise
            a split of the run's own data.
        evaluation: context lengths, budget and precision.
        device: ``auto`` takes a GPU where there is one.
        output_dir: folder of the files; None is ``evaluation`` in the run's folder, and for other data than
            the run's own ``evaluation_NAME`` beside it.

    Raises:
        UserError: the checkpoint, the data or the device cannot be used.
    """
    from rich.console import Console

    bundle = load(checkpoint, device_named(device))
    documents, source_identity = scored_documents(bundle, evaluation.split, data)
    facts = RunFacts(
        training_length=bundle.config["sequence_length"],
        window=bundle.model.config.window,
        receptive_field=bundle.receptive_field,
        tokens_trained=bundle.config["training"].get("tokens_trained"),
        tokenizer_identity=bundle.tokenizer.identity,
        source_identity=source_identity,
        split=documents.name,
    )
    run = bundle.folder.parent if bundle.folder.name == MODEL_FOLDER else bundle.folder
    folder = run / evaluation_name(data) if output_dir is None else output_dir
    _check_writable(folder)
    result, earlier = evaluate_model(
        bundle.model, documents, bundle.tokenizer.token_bytes_V, evaluation, facts, folder
    )
    console = Console()
    console.print(length_table(result))
    if earlier is not None:
        console.out(f"the earlier result is kept in {shlex.quote(str(earlier))}", highlight=False)
    console.out(f"results in {shlex.quote(str(folder))}", highlight=False)
    return result


def _check_writable(folder: Path) -> None:
    """Raise UserError, before the work, where a folder cannot be made or written."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "may not be written" if nearest.is_dir() else "is a file"
        raise UserError(f"output_dir={folder}: {nearest} {reason}; give a folder that can be written")
