"""The evaluation as a run and ``scripts/evaluate.py`` call it: score, write the files, return the result."""

import logging
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from windowlm.atomic_write import obstacle
from windowlm.bundle import ScorableModel, device_named, load_scorable
from windowlm.data.identity import packages_version
from windowlm.data.token_store import TokenSplit
from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.html_page import Section, html_page
from windowlm.evaluation.kept_nats import KeptNats, scoring_key, weights_hash
from windowlm.evaluation.length_page import (
    PAGE_NAME,
    cost_rows,
    length_sections,
    pace_rows,
    settings_of_run,
)
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.progress_lines import ProgressLines
from windowlm.evaluation.report import length_plot, length_table
from windowlm.evaluation.result import LengthResult, RunFacts
from windowlm.evaluation.result_files import PLOT_NAME, evaluation_name, write_results
from windowlm.evaluation.scored_documents import scored_documents
from windowlm.evaluation.target_losses import LOSSES_NAME, TargetLosses
from windowlm.evaluation.targets import Documents, TargetSet
from windowlm.interchange.adapter import TransformersModel
from windowlm.model.decoder import Decoder
from windowlm.model_folder import IN_RUN
from windowlm.parallel.own_gpu import own_gpu
from windowlm.parallel.processes import ALONE, Processes


class TextDocuments(Documents, Protocol):
    """Documents with their text."""

    def text(self, document: int) -> str:
        """The text of a document."""
        ...


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """A finished run as ``evaluate_checkpoint`` scored it.

    Attributes:
        bundle: the run's model and tokenizer.
        documents: what was scored.
        result: what ``length.json`` holds.
        losses: nats of every target.
        sections: of the page.
        evaluation: the settings of the scoring.
        folder: where the files are.
    """

    bundle: ScorableModel
    documents: TokenSplit
    result: LengthResult
    losses: TargetLosses
    sections: list[Section]
    evaluation: EvaluationConfig
    folder: Path


def evaluate_model(
    model: Decoder,
    documents: TextDocuments,
    token_bytes_V: npt.NDArray[np.int64],
    evaluation: EvaluationConfig,
    facts: RunFacts,
    folder: Path,
    processes: Processes = ALONE,
    between_rounds: Callable[[], object] | None = None,
) -> tuple[LengthResult, Path | None]:
    """Score a model on its device, with a progress bar or lines on standard error, and write the result.

    Parts that are scored are kept in the folder until then, so that the same call goes on where one was
    interrupted; of a finished evaluation by the same model nothing is read again.

    Args:
        model: it is not changed.
        documents: the split.
        token_bytes_V: UTF-8 bytes that each token stands for.
        evaluation: context lengths, budget and precision.
        facts: what the result says about the run.
        folder: gets the files of ``result_files``, which the leader writes.
        processes: those that share the scoring; each calls this, with its own copy of the model.
        between_rounds: called where a part is kept and others are missing; what it raises ends the scoring.

    Returns:
        The result, and where a different one that ``folder`` held was moved, or None.

    Raises:
        UserError: no document is long enough, or the model cannot be scored.
        LostProcessError: a process is gone.
    """
    result, earlier, _, _ = _evaluate(
        model, documents, token_bytes_V, evaluation, facts, folder, processes, between_rounds
    )
    return result, earlier


def _evaluate(
    model: Decoder | TransformersModel,
    documents: TextDocuments,
    token_bytes_V: npt.NDArray[np.int64],
    evaluation: EvaluationConfig,
    facts: RunFacts,
    folder: Path,
    processes: Processes,
    between_rounds: Callable[[], object] | None = None,
) -> tuple[LengthResult, Path | None, TargetLosses, list[Section]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, quiet=not processes.leads)
    drawn = console.is_interactive and processes.leads
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not drawn) as progress:
        description = "perplexity by context length"
        task = progress.add_task(description, total=None)
        lines = ProgressLines(description, shown=processes.leads and not drawn)
        weights = weights_hash(model)
        facts = {**facts, "weights": weights}
        kept = KeptNats(folder, _agreed_key(model, weights, evaluation, processes))
        if kept.damaged:
            console.print(f"{folder / LOSSES_NAME}: damaged, so that all is scored again", soft_wrap=True)
        read = scored_before = 0

        def show(done: int, total: int, read_now: int) -> None:
            nonlocal read, scored_before
            if not read_now:
                scored_before = done
            elif scored_before and not read:
                console.print(f"{description}: going on, {scored_before / total:.0%} was scored before")
            read = read_now
            progress.update(task, completed=done, total=total)
            lines.update(done, total)

        started = time.perf_counter()
        result, targets, losses = length_sweep(
            model,
            documents,
            token_bytes_V,
            evaluation,
            facts,
            on_progress=show,
            kept=kept,
            processes=processes,
            between_rounds=between_rounds,
        )
        seconds = time.perf_counter() - started
    pace = read / seconds / processes.size if read else kept.tokens_per_second
    losses = replace(losses, scoring_key=kept.scoring_key, tokens_per_second=pace)
    if not read:
        console.print("perplexity by context length: scored already, by the same model at the same targets")
    if isinstance(model, Decoder):
        words = _words(documents, targets)
        costs = cost_rows(model.config, model.vocabulary_size, result, words, pace)
    else:
        costs = pace_rows(result, pace)
    sections = length_sections(result, costs, settings_of_run(folder.parent))
    earlier = None
    if processes.leads:
        page = html_page(f"Evaluation of {folder.parent.name}", sections)
        earlier = write_results(
            folder, result, targets, losses, {PLOT_NAME: length_plot(result), PAGE_NAME: page}
        )
        kept.remove()
    return result, earlier, losses, sections


def _agreed_key(
    model: Decoder | TransformersModel, weights: str, evaluation: EvaluationConfig, processes: Processes
) -> str:
    """The scoring key, which is that of all processes."""
    key = scoring_key(weights, _scoring_settings(model, evaluation))
    if set(processes.gather(key)) != {key}:
        raise UserError(
            "the processes of this evaluation hold different models, settings or versions; start all of them "
            "from the same files"
        )
    return key


def _scoring_settings(model: Decoder | TransformersModel, evaluation: EvaluationConfig) -> dict[str, Any]:
    """What decides a target's nats to the bit besides the weights."""
    shape = asdict(model.config) if isinstance(model, Decoder) else model.model.config.to_dict()
    return {
        "model": shape,
        "precision": evaluation.precision,
        "batch_tokens": evaluation.batch_tokens,
        "streaming": evaluation.streaming,
        "device": next(model.parameters()).device.type,
        "code": packages_version("attention", "bundle", "evaluation", "interchange", "model"),
        "torch": version("torch"),
    }


def _words(documents: TextDocuments, targets: TargetSet) -> int:
    """Whitespace words of the scored text."""
    return sum(
        len(documents.text(region.document).encode()[region.first_byte : region.end_byte].split())
        for region in targets.regions
    )


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    data: Mapping[str, Any],
    evaluation: EvaluationConfig,
    device: str = "auto",
    output_dir: Path | None = None,
    processes: Processes = ALONE,
) -> Evaluated:
    """Score a finished run, or a model of transformers; print the table and say where the files are.

    Args:
        checkpoint: a run's folder, a model's folder in our layout or transformers', or a name of the hub.
        data: settings of the documents. With ``path`` or ``name`` all documents there are scored, otherwise
            a split of the run's own data.
        evaluation: context lengths, budget and precision.
        device: ``auto`` takes a GPU where there is one; several processes take one each.
        output_dir: folder of the files; None is ``evaluation`` in the run's folder, and for other data than
            the run's own ``evaluation_NAME`` beside it. A model of the hub has ``runs/OWNER--NAME``.
        processes: those that share the scoring; each calls this with the same arguments and gets the same,
            and the leader prints and writes.

    Raises:
        UserError: the checkpoint, the data or the device cannot be used.
        LostProcessError: a process is gone.
    """
    from rich.console import Console

    if not processes.leads:
        logging.getLogger("windowlm.attention").setLevel(logging.WARNING)
    bundle = load_scorable(checkpoint, own_gpu(device_named(device), processes.place, "devices"))
    documents, source_identity = processes.leader_first(
        lambda: scored_documents(bundle, evaluation.split, data)
    )
    facts = RunFacts(
        training_length=bundle.config["sequence_length"],
        window=bundle.window,
        receptive_field=bundle.receptive_field,
        tokens_trained=bundle.config["training"].get("tokens_trained"),
        tokenizer_identity=bundle.tokenizer.identity,
        source_identity=source_identity,
        split=documents.name,
    )
    run = bundle.folder.parent if bundle.folder.name == IN_RUN else bundle.folder
    if not checkpoint.is_dir():
        run = Path("runs", str(checkpoint).replace("/", "--"))
    folder = run / evaluation_name(data) if output_dir is None else output_dir
    if (reason := obstacle(folder)) is not None:
        raise UserError(f"output_dir={folder}: {reason}; give a folder that can be written")
    result, earlier, losses, sections = _evaluate(
        bundle.model, documents, bundle.tokenizer.token_bytes_V, evaluation, facts, folder, processes
    )
    console = Console(quiet=not processes.leads)
    console.print(length_table(result))
    if earlier is not None:
        console.out(f"the earlier result is kept in {shlex.quote(str(earlier))}", highlight=False)
    console.out(f"results in {shlex.quote(str(folder))}", highlight=False)
    return Evaluated(
        bundle=bundle,
        documents=documents,
        result=result,
        losses=losses,
        sections=sections,
        evaluation=evaluation,
        folder=folder,
    )
