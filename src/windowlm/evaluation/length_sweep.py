"""One model scored on the same targets at every context length."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from windowlm.errors import UserError
from windowlm.evaluation.clusters import sums_by_cluster
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.context_lengths import resolve_context_lengths
from windowlm.evaluation.dealt_parts import score_parts
from windowlm.evaluation.equivalence import LEVEL, Equivalence, equivalence
from windowlm.evaluation.kept_nats import KeptNats
from windowlm.evaluation.multiple_comparisons import holm
from windowlm.evaluation.paired_difference import CONFIDENCE, paired_difference
from windowlm.evaluation.passes import passes_of
from windowlm.evaluation.position_curve import position_curve
from windowlm.evaluation.precision import scoring
from windowlm.evaluation.result import (
    FORMAT,
    EqualToLongest,
    LengthResult,
    Paired,
    Row,
    RunFacts,
    bits_per_byte,
    interval,
)
from windowlm.evaluation.target_losses import TargetLosses, losses_of
from windowlm.evaluation.targets import (
    Documents,
    TargetSet,
    choose_targets,
    read_byte_ranges,
    targets_in_bytes,
)
from windowlm.parallel.processes import ALONE, Processes


def plan_targets(
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    evaluation: EvaluationConfig,
    training_length: int,
) -> tuple[list[int], TargetSet]:
    """Context lengths and targets of an evaluation; cheap, so that a run can check them before step one.

    Raises:
        UserError: no document is long enough, or the targets given cannot be scored here.
    """
    text_lengths = np.asarray(documents.lengths, dtype=np.int64) - 1
    context_lengths = resolve_context_lengths(evaluation.context_lengths, training_length, text_lengths)
    if evaluation.targets is not None:
        ranges = read_byte_ranges(Path(evaluation.targets))
        return context_lengths, targets_in_bytes(documents, token_bytes_V, context_lengths[-1], ranges)
    targets = choose_targets(
        documents,
        token_bytes_V,
        context_lengths[-1],
        evaluation.max_targets,
        evaluation.max_targets_per_document,
        evaluation.bytes_per_author,
    )
    if not targets.regions:
        raise UserError(
            f"evaluation.bytes_per_author={evaluation.bytes_per_author}: none of "
            f"{targets.authors_too_short} authors has so many bytes behind the longest context, "
            f"{context_lengths[-1]} tokens; ask for fewer bytes, or shorter evaluation.context_lengths"
        )
    return context_lengths, targets


def length_sweep(
    model: nn.Module,
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    evaluation: EvaluationConfig,
    facts: RunFacts,
    on_progress: Callable[[int, int, int], Any] | None = None,
    kept: KeptNats | None = None,
    processes: Processes = ALONE,
    between_rounds: Callable[[], object] | None = None,
) -> tuple[LengthResult, TargetSet, TargetLosses]:
    """Score the fixed targets at every context length.

    Args:
        model: a causal model with the two parts of ``token_loss.LanguageModel``, on its device; it is not
            changed.
        documents: the split.
        token_bytes_V: UTF-8 bytes that each token stands for, 0 for the end mark.
        evaluation: context lengths, budget and precision.
        facts: what the result says about the run.
        on_progress: called with the tokens that are done, those that there are in all, and how many of them
            the model has read in this call, on all processes.
        kept: what is scored already, and where parts go that are; None for nothing and nowhere. The leader's
            counts.
        processes: those that share the work; each calls this with the same arguments and gets the same.
        between_rounds: see ``score_parts``.

    Raises:
        UserError: no document is long enough; 16-mixed on a CPU; a loss is not finite or beyond all bounds;
            a part cannot be kept.
        LostProcessError: a process is gone.
    """
    context_lengths, targets = plan_targets(documents, token_bytes_V, evaluation, facts["training_length"])
    passes = passes_of(
        model,
        documents,
        targets,
        context_lengths,
        receptive_field=facts["receptive_field"],
        batch_tokens=evaluation.batch_tokens,
        streaming=evaluation.streaming,
    )
    total = sum(each.tokens for each in passes)
    done = read = 0

    def advance(tokens: int, read_now: int) -> None:
        nonlocal done, read
        done += tokens
        read += read_now
        if on_progress is not None:
            on_progress(min(done, total), total, read)

    device = next(model.parameters()).device
    with scoring(model, evaluation.precision) as scored:
        nats = score_parts(
            scored,
            passes,
            targets.hash,
            device=device,
            advance=advance,
            kept=kept,
            processes=processes,
            between_rounds=between_rounds,
        )
    in_order = {kind: {c: by_length[c] for c in context_lengths} for kind, by_length in nats.items()}
    losses = losses_of(
        targets,
        documents,
        token_bytes_V,
        facts["tokenizer_identity"],
        in_order["protocol"],
        in_order["naive"],
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return _result(losses, targets, documents, evaluation, facts, parameters), targets, losses


def _result(
    losses: TargetLosses,
    targets: TargetSet,
    documents: Documents,
    evaluation: EvaluationConfig,
    facts: RunFacts,
    parameters: int,
) -> LengthResult:
    regions = targets.regions
    context_lengths = sorted(losses.nats)
    shortest, longest = context_lengths[0], context_lengths[-1]
    byte_counts = np.array([region.end_byte - region.first_byte for region in regions])
    byte_total = int(byte_counts.sum())
    nats = {c: losses.by_document(losses.nats[c]) for c in context_lengths}
    cluster_bytes = sums_by_cluster(byte_counts, losses.clusters)
    bits = {
        c: bits_per_byte(sums_by_cluster(nats[c], losses.clusters), cluster_bytes) for c in context_lengths
    }
    equal = _equal_to_longest([equivalence(bits[c] - bits[longest]) for c in context_lengths[:-1]])

    def row(number: int, c: int) -> Row:
        total = math.fsum(nats[c])
        naive_total = math.fsum(losses.by_document(losses.naive_nats[c]))
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
            "equal_to_longest": None if c == longest else equal[number],
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
        "rows": [row(number, c) for number, c in enumerate(context_lengths)],
        "paired": paired,
        "cluster": "document" if all(author is None for author in losses.authors) else "author",
        "position_curve": position_curve(losses),
        "targets_hash": targets.hash,
        "targets_within": targets.within,
        "documents_too_short": targets.documents_too_short,
        "documents_over_budget": targets.documents_over_budget,
        "authors_too_short": targets.authors_too_short,
        "bytes_per_author": evaluation.bytes_per_author,
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


def _equal_to_longest(verdicts: Sequence[Equivalence | None]) -> list[EqualToLongest | None]:
    """Verdicts on several lengths, together: Holm's p-values decide."""
    known = [verdict for verdict in verdicts if verdict is not None]
    adjusted = iter(holm([verdict.p for verdict in known]))
    return [
        None
        if verdict is None
        else {
            "margin": verdict.margin,
            "p": verdict.p,
            "p_holm": (p := next(adjusted)),
            "equivalent": p <= LEVEL,
        }
        for verdict in verdicts
    ]


def _perplexity(nats: float, target_count: int) -> float:
    try:
        return math.exp(nats / target_count)
    except OverflowError:
        raise UserError(
            f"the model's loss is {nats / target_count:.3g} nats a token, a perplexity beyond any number: "
            "its training diverged; train again with a lower rate, for example optimizer.lr=0.001"
        ) from None
