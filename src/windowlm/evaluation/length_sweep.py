"""One model scored on the same targets at every context length."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from windowlm.errors import UserError
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.context_lengths import resolve_context_lengths
from windowlm.evaluation.paired_difference import CONFIDENCE, paired_difference
from windowlm.evaluation.precision import scoring
from windowlm.evaluation.result import FORMAT, LengthResult, Paired, Row, RunFacts, bits_per_byte, interval
from windowlm.evaluation.targets import (
    Documents,
    ScoredWindow,
    TargetSet,
    choose_targets,
    naive_windows,
    protocol_windows,
)
from windowlm.evaluation.token_loss import target_nats


def plan_targets(
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    evaluation: EvaluationConfig,
    training_length: int,
) -> tuple[list[int], TargetSet]:
    """Context lengths and targets of an evaluation; cheap, so that a run can check them before step one.

    Raises:
        UserError: no document is long enough.
    """
    text_lengths = np.asarray(documents.lengths, dtype=np.int64) - 1
    context_lengths = resolve_context_lengths(evaluation.context_lengths, training_length, text_lengths)
    targets = choose_targets(
        documents,
        token_bytes_V,
        context_lengths[-1],
        evaluation.max_targets,
        evaluation.max_targets_per_document,
    )
    return context_lengths, targets


def length_sweep(
    model: nn.Module,
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    evaluation: EvaluationConfig,
    facts: RunFacts,
    on_progress: Callable[[int, int], Any] | None = None,
) -> tuple[LengthResult, TargetSet]:
    """Score the fixed targets at every context length.

    Args:
        model: a causal model with the two parts of ``token_loss.LanguageModel``, on its device; it is not
            changed.
        documents: the split.
        token_bytes_V: UTF-8 bytes that each token stands for, 0 for the end mark.
        evaluation: context lengths, budget and precision.
        facts: what the result says about the run.
        on_progress: called with the tokens read so far and those to read in all.

    Raises:
        UserError: no document is long enough; 16-mixed on a CPU; a loss is not finite or beyond all bounds.
    """
    context_lengths, targets = plan_targets(documents, token_bytes_V, evaluation, facts["training_length"])
    protocol = {c: protocol_windows(targets.regions, c) for c in context_lengths}
    naive = {c: naive_windows(targets.regions, c) for c in context_lengths}
    total = sum(_tokens_read(windows) for by_length in (protocol, naive) for windows in by_length.values())
    read = 0

    def advance(tokens: int) -> None:
        nonlocal read
        read += tokens
        if on_progress is not None:
            on_progress(min(read, total), total)

    with scoring(model, evaluation.precision) as scored:

        def document_nats(windows: Sequence[ScoredWindow]) -> npt.NDArray[np.float64]:
            nats = target_nats(
                scored,  # type: ignore[arg-type]  # nn.Module hides its parts from the type checker
                documents,
                windows,
                device=next(model.parameters()).device,
                batch_tokens=evaluation.batch_tokens,
                on_tokens=advance,
            )
            counts = [region.end - region.first for region in targets.regions]
            starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
            return np.add.reduceat(nats, starts)

        nats = {c: document_nats(protocol[c]) for c in context_lengths}
        naive_nats = {c: document_nats(naive[c]) for c in context_lengths}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result = _result(context_lengths, targets, documents, nats, naive_nats, evaluation, facts, parameters)
    return result, targets


def _tokens_read(windows: Sequence[ScoredWindow]) -> int:
    return sum(window.end - window.start - 1 for window in windows)


def _result(
    context_lengths: list[int],
    targets: TargetSet,
    documents: Documents,
    nats: dict[int, npt.NDArray[np.float64]],
    naive_nats: dict[int, npt.NDArray[np.float64]],
    evaluation: EvaluationConfig,
    facts: RunFacts,
    parameters: int,
) -> LengthResult:
    regions = targets.regions
    byte_counts = np.array([region.end_byte - region.first_byte for region in regions])
    byte_total = int(byte_counts.sum())
    bits = {c: bits_per_byte(nats[c], byte_counts) for c in context_lengths}
    shortest, longest = context_lengths[0], context_lengths[-1]

    def row(c: int) -> Row:
        total, naive_total = math.fsum(nats[c]), math.fsum(naive_nats[c])
        return {
            "context_length": c,
            "targets": targets.target_count,
            "bytes": byte_total,
            "nats": total,
            "perplexity": _perplexity(total, targets.target_count),
            "bits_per_byte": total / math.log(2) / byte_total,
            "extrapolation": 2 * c > facts["training_length"],
            "change_from_shortest": (
                None if c == shortest else interval(paired_difference(bits[shortest], bits[c]))
            ),
            "naive_nats": naive_total,
            "naive_perplexity": _perplexity(naive_total, targets.target_count),
            "naive_bits_per_byte": naive_total / math.log(2) / byte_total,
        }

    paired: Paired | None = None
    if shortest != longest:
        change = interval(paired_difference(bits[shortest], bits[longest]))
        paired = {"shortest": shortest, "longest": longest, "confidence": CONFIDENCE, **change}
    return {
        "format": FORMAT,
        "rows": [row(c) for c in context_lengths],
        "paired": paired,
        "targets_hash": targets.hash,
        "documents_too_short": targets.documents_too_short,
        "documents_over_budget": targets.documents_over_budget,
        "precision": evaluation.precision,
        "parameters": parameters,
        **facts,
        "documents": [
            {
                "document_hash": region.document_hash,
                "title": documents.title(region.document),
                "author": documents.author(region.document),
                "targets": region.end - region.first,
                "bytes": region.end_byte - region.first_byte,
                "nats": {str(c): float(nats[c][index]) for c in context_lengths},
            }
            for index, region in enumerate(regions)
        ],
    }


def _perplexity(nats: float, target_count: int) -> float:
    try:
        return math.exp(nats / target_count)
    except OverflowError:
        raise UserError(
            f"the model's loss is {nats / target_count:.3g} nats a token, a perplexity beyond any number: "
            "its training diverged; train again with a lower rate, for example optimizer.lr=0.001"
        ) from None
