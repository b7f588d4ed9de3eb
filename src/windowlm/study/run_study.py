"""The measures of a scored run, one after the other, and the page that shows them."""

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from windowlm.atomic_write import write_atomically
from windowlm.data.identity import code_version, hash_of
from windowlm.errors import UserError
from windowlm.evaluation.evaluate import Evaluated
from windowlm.evaluation.html_page import Section, html_page
from windowlm.evaluation.length_page import PAGE_NAME
from windowlm.evaluation.precision import scoring
from windowlm.evaluation.result import trained_context
from windowlm.evaluation.result_files import read_result
from windowlm.evaluation.scored_documents import training_documents
from windowlm.evaluation.target_losses import LOSSES_NAME, read_losses
from windowlm.model_folder import find_model_folder
from windowlm.study import rare_words, words
from windowlm.study.config import StudyConfig
from windowlm.study.far_context import far_context
from windowlm.study.far_repeats import far_repeats
from windowlm.study.forced_choice import forced_choice
from windowlm.study.key_words import Chooser, key_words
from windowlm.study.measure_charts import TITLES, measure_charts
from windowlm.study.measure_files import STUDY_FOLDER, measures_in, read_measure, write_measure
from windowlm.study.measure_result import CLUSTERS, MeasureResult
from windowlm.study.pasted_spans import pasted_spans
from windowlm.study.rare_words import RareWords
from windowlm.study.reach import reach
from windowlm.study.subject import Subject
from windowlm.study.useful_reach import useful_reach

PROBED_BEYOND = 64  # tokens probed beyond the receptive field, of which none may alter the output
PROBED_WITHOUT = 1024  # tokens probed of a model that sees everything
# Which settings decide a measure, so that one that was made with the same ones is not made again.
SETTINGS: dict[str, tuple[str, ...]] = {
    "far_repeats": ("distances",),
    "key_words": ("choosers", "threshold"),
    "pasted_spans": ("distances", "span", "places", "window", "seed"),
    "forced_choice": ("distances", "depths", "places", "window", "seed"),
    "far_context": ("near", "max_targets", "block", "seed"),
    "reach": ("seed",),
    "useful_reach": (),
}


def check_measures(checkpoint: Path, study: StudyConfig) -> None:
    """Refuse, before anything is scored, what the checkpoint cannot be measured by.

    That is a measure that it cannot have, and a chooser that is not there.

    Raises:
        UserError: there is one, or the checkpoint cannot be read.
    """
    for run in study.choosers:
        if not Path(run).is_dir():
            raise UserError(f"study.choosers={run}: there is no such folder; give the folder of a run")
    if "far_repeats" in study.measures and find_model_folder(checkpoint).foreign:
        raise UserError(
            "study.measures: far_repeats looks for words that are rare in the model's training, and which "
            f"documents others trained checkpoint={checkpoint} on is not known; leave far_repeats away"
        )


def run_study(evaluated: Evaluated, study: StudyConfig) -> list[MeasureResult]:
    """Make the measures asked for, write their files and the page, and say where they are.

    A measure that is there already, of the same model, targets and settings, is not made again: an
    interrupted study goes on with the next one.

    Args:
        evaluated: the scored run.
        study: what to measure, and how.

    Returns:
        The results, those that were there already included.

    Raises:
        UserError: a setting does not fit the run, or a file is damaged; what is there stays as it is.
    """
    from rich.console import Console

    console, errors = Console(), Console(stderr=True)
    folder = evaluated.folder
    choosers = _choosers(evaluated, study)
    there = {name: read_measure(folder, name) for name in SETTINGS}
    facts = _facts(evaluated)
    results = []
    with scoring(evaluated.bundle.model, evaluated.evaluation.precision) as model:
        subject = _subject(evaluated, model)
        # The number itself is recorded: models of other training lengths have other texts behind a null.
        study = replace(study, window=subject.window_bytes if study.window is None else study.window)
        makers = _makers(evaluated, subject, study, facts["model"], choosers)
        for number, name in enumerate(study.measures, start=1):
            settings = facts | _settings(name, evaluated, study, choosers)
            earlier = there[name]
            if earlier is not None and earlier["settings"] == settings:
                errors.print(f"{name}: made already, with the same settings")
                results.append(earlier)
                continue
            with errors.status(f"{name} ({number} of {len(study.measures)})"):
                result = makers[name]()
            result["settings"] = settings
            kept = write_measure(folder, result)
            results.append(result)
            if kept is not None:
                console.out(f"the earlier {name} is kept in {shlex.quote(str(kept))}", highlight=False)
            for sentence in (*result["meaning"], *result["left_out"]):
                console.print(f"{name}: {sentence}", highlight=False, markup=False)
    shown = [result for result in measures_in(folder) if _is_of(result, facts)]
    if shown:
        page = html_page(f"Evaluation of {folder.parent.name}", study_sections(evaluated.sections, shown))
        write_atomically(folder / PAGE_NAME, page)
    if results:
        console.out(f"measures in {shlex.quote(str(folder / STUDY_FOLDER))}", highlight=False)
    return results


def _settings(
    name: str, evaluated: Evaluated, study: StudyConfig, choosers: dict[str, Chooser]
) -> dict[str, Any]:
    """What decides a measure besides the evaluation; for a null or a folder, what it stands for."""
    found = {key: getattr(study, key) for key in SETTINGS[name]}
    if name == "key_words":
        found["choosers"] = {run: _identity(chooser) for run, chooser in choosers.items()}
    if name == "far_context":
        found["near"], found["far"] = _near_and_far(evaluated, study)
    return found


def study_sections(sections: list[Section], results: list[MeasureResult]) -> list[Section]:
    """Sections of the page with those of the measures behind the first, the loss by context length."""
    measured = [
        Section(
            TITLES[result["measure"]],
            [*result["meaning"], *result["left_out"]],
            measure_charts(result),
            result["rows"],
            folded=len(result["rows"]) > 12,
        )
        for result in results
    ]
    settings = [
        {"measure": result["measure"], **{key: _short(value) for key, value in result["settings"].items()}}
        for result in results
    ]
    made = Section("Settings of the measures", rows=settings, folded=True)
    return [sections[0], *measured, *sections[1:], made]


def _subject(evaluated: Evaluated, model: Any) -> Subject:
    documents = evaluated.documents
    texts = {documents.document_hash(index): index for index in range(len(documents))}
    return Subject(
        model=model,
        tokenizer=evaluated.bundle.tokenizer,
        texts={digest: documents.text(texts[digest]) for digest in evaluated.losses.document_hashes},
        losses=evaluated.losses,
        training_length=evaluated.result["training_length"],
        batch_tokens=evaluated.evaluation.batch_tokens,
    )


def _makers(
    evaluated: Evaluated,
    subject: Subject,
    study: StudyConfig,
    weights: str,
    choosers: dict[str, Chooser],
) -> dict[str, Callable[[], MeasureResult]]:
    window = study.window
    assert window is not None

    def make_far_repeats() -> MeasureResult:
        training, cache = training_documents(evaluated.bundle)
        key = hash_of(evaluated.bundle.config["source_identity"], code_version(rare_words, words))
        path = cache / "rare_words" / f"{key}.json"
        rare = RareWords.kept_in(path, (training.text(number) for number in range(len(training))))
        return far_repeats(subject.losses, subject.texts, rare, study.distances)

    def make_far_context() -> MeasureResult:
        near, far = _near_and_far(evaluated, study)
        made = far_context(
            subject,
            evaluated.documents,
            near=near,
            far=far,
            block=study.block,
            max_targets=study.max_targets,
            seed=study.seed,
        )
        field = evaluated.result["receptive_field"]
        if field is not None and near >= field:
            made["left_out"].append(
                f"The near context of {near:,} tokens is all that this model sees, {field:,}: what lies "
                "before cannot matter to it."
            )
        if 2 * far > evaluated.result["training_length"]:
            made["left_out"].append(
                f"Windows of {2 * far:,} tokens are longer than those of its training, "
                f"{evaluated.result['training_length']:,}: what the far context is worth and how the model "
                "breaks there cannot be told apart."
            )
        return made

    def make_reach() -> MeasureResult:
        field = evaluated.result["receptive_field"]
        length = PROBED_WITHOUT if field is None else field + PROBED_BEYOND
        length = min(length, getattr(evaluated.bundle.model, "most_positions", None) or length)
        tokens = np.concatenate([subject.encode([data])[0] for data in subject.data.values()])
        # Repeated where the documents are shorter: which tokens they are does not matter here.
        probed = np.resize(tokens, length)
        exact = torch.autocast(subject.device.type, enabled=False)
        with exact, scoring(evaluated.bundle.model, "64-true") as double:
            return reach(double, probed, field, subject.tokenizer.vocabulary_size, study.seed)

    return {
        "far_repeats": make_far_repeats,
        "key_words": lambda: key_words(subject.losses, weights, choosers, subject.texts, study.threshold),
        "pasted_spans": lambda: pasted_spans(
            subject,
            study.distances,
            span=study.span,
            places=study.places,
            window=window,
            seed=study.seed,
        ),
        "forced_choice": lambda: forced_choice(
            subject, study.distances, study.depths, places=study.places, window=window, seed=study.seed
        ),
        "far_context": make_far_context,
        "reach": make_reach,
        "useful_reach": lambda: useful_reach(evaluated.result),
    }


def _near_and_far(evaluated: Evaluated, study: StudyConfig) -> tuple[int, int]:
    lengths = [row["context_length"] for row in evaluated.result["rows"]]
    far = trained_context([evaluated.result])
    assert far is not None
    near = study.near or max((c for c in lengths if c <= far // 4), default=lengths[0])
    if near >= far:
        raise UserError(
            f"study.near={near}: must be below the longest context length within the training, {far}, since "
            f"what lies between them is the far context; try study.near={max(1, far // 4)}"
        )
    return near, far


def _choosers(evaluated: Evaluated, study: StudyConfig) -> dict[str, Chooser]:
    """The choosers, read before anything is measured."""
    found = {}
    for run in study.choosers:
        name = evaluated.folder.name
        advice = f"score it in the same way: python scripts/evaluate.py checkpoint={shlex.quote(run)}"
        losses = read_losses(Path(run) / name / LOSSES_NAME, advice)
        result = read_result(Path(run), name)
        context = trained_context([result])
        if context not in losses.nats:
            raise UserError(
                f"{Path(run) / name}: {LOSSES_NAME} and its result are of two evaluations; {advice}"
            )
        found[run] = Chooser(losses, context, result.get("weights", ""))
    return found


def _identity(chooser: Chooser) -> str:
    """Hash of what decides its key words."""
    nats = chooser.losses.nats
    digest = hashlib.sha256(chooser.weights.encode())
    for context in (min(nats), chooser.context):
        digest.update(f"{context}".encode() + nats[context].tobytes())
    return digest.hexdigest()


def _facts(evaluated: Evaluated) -> dict[str, Any]:
    scored = evaluated.result["documents"]
    return {
        "model": evaluated.result["weights"],
        "targets_hash": evaluated.result["targets_hash"],
        # The same text may be read with other authors, which the intervals are over.
        CLUSTERS: hash_of([(document["document_hash"], document["author"]) for document in scored]),
        "context_lengths": [row["context_length"] for row in evaluated.result["rows"]],
        "precision": evaluated.evaluation.precision,
    }


def _is_of(result: MeasureResult, facts: dict[str, Any]) -> bool:
    return all(result["settings"].get(key) == value for key, value in facts.items())


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
