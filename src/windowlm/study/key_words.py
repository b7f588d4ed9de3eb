"""Loss on words that profit from long context, chosen by another model (after LongPPL, Fang et al. 2024).

Shape letters: N targets, W words of a document.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from windowlm.errors import UserError
from windowlm.evaluation.target_losses import TargetLosses
from windowlm.study.loss_by_group import loss_by_group
from windowlm.study.measure_result import MeasureResult, measure_result
from windowlm.study.words import SPACED, words_of


@dataclass(frozen=True)
class Chooser:
    """Another run, scored on the same targets.

    Attributes:
        losses: its nats.
        context: its longest context length within its training: beyond it words cost more because the model
            breaks, and none would seem to gain.
        weights: hash of them.
    """

    losses: TargetLosses
    context: int
    weights: str


def word_of_target(losses: TargetLosses, texts: Mapping[str, str]) -> npt.NDArray[np.int64]:
    """Number of the whitespace word that each target ends in, -1 for none, ``[N]``.

    Words are numbered through all documents. Of a word that the targets hold only in part, none count.
    """
    words_N = np.full(len(losses.document), -1, dtype=np.int64)
    begun = 0
    for number, digest in enumerate(losses.document_hashes):
        words = words_of(texts[digest], SPACED)
        inside = np.flatnonzero((losses.document == number) & (losses.byte_count > 0))
        first = losses.first_byte[inside]
        last = first + losses.byte_count[inside] - 1
        found = np.searchsorted(words.start, last, side="right") - 1
        whole = (found >= 0) & (last < words.end[found])
        whole &= (words.start[found] >= first[0]) & (words.end[found] <= last[-1] + 1)
        words_N[inside[whole]] = begun + found[whole]
        begun += len(words.names)
    return words_N


def key_targets(chooser: Chooser, words_N: npt.NDArray[np.int64], threshold: float) -> npt.NDArray[np.bool_]:
    """Targets in words that cost the chooser ``threshold`` nats less at its context than at its shortest,
    ``[N]``.

    A word's nats are summed first, so that the choice does not depend on how a tokenizer cuts it.
    """
    nats = chooser.losses.nats
    gains = np.zeros(int(words_N.max(initial=-1)) + 1)
    inside_N = words_N >= 0
    np.add.at(gains, words_N[inside_N], (nats[min(nats)] - nats[chooser.context])[inside_N])
    chosen_N = np.zeros(len(words_N), dtype=bool)
    chosen_N[inside_N] = gains[words_N[inside_N]] >= threshold
    return chosen_N


def key_words(
    losses: TargetLosses,
    weights: str,
    choosers: Mapping[str, Chooser],
    texts: Mapping[str, str],
    threshold: float,
) -> MeasureResult:
    """Nats a byte of key words by context length, for each chooser.

    A model that chose its own key words would look better than it is: its lucky guesses would be chosen. So
    the choosers are other models, and each gives rows of its own. Of several, one that is the measured run is
    left out, so that the runs of a study can all be given the same choosers.

    Args:
        losses: nats of the run that is measured.
        weights: hash of its weights.
        choosers: other runs by name.
        texts: text of each document by its hash.
        threshold: nats.

    Raises:
        UserError: a chooser scored other targets, at one length only, or the only one is the measured run.
    """
    words_N = word_of_target(losses, texts)
    rows, clusters, left_out = [], [], []
    for name, chooser in choosers.items():
        theirs = chooser.losses
        if theirs.targets_hash != losses.targets_hash or len(theirs.document) != len(losses.document):
            raise UserError(
                f"study.choosers={name}: it scored other targets; score it on the same data with the same "
                "evaluation.context_lengths and budget, and the same tokenizer"
            )
        if min(theirs.nats) == chooser.context:
            raise UserError(
                f"study.choosers={name}: within its training it is scored at one context length only, and "
                "key words are those that gain between two; score it with more evaluation.context_lengths"
            )
        # The same model in another file has other weights' hash, but its nats.
        same_nats = np.array_equal(theirs.nats[chooser.context], losses.nats.get(chooser.context, []))
        if chooser.weights == weights or same_nats:
            if len(choosers) > 1:
                left_out.append(f"{name} is the measured run, which may not choose its own key words.")
                continue
            raise UserError(
                f"study.choosers={name}: it is the measured run, which may not choose its own key words; "
                "give a run with another seed, or another model"
            )
        chosen_N = key_targets(chooser, words_N, threshold)
        if not chosen_N.any():
            left_out.append(f"By {name} no word gains {threshold:g} nats.")
            continue
        group = {
            "chooser": name,
            "chooser_context": chooser.context,
            "words": len(np.unique(words_N[chosen_N])),
        }
        found, sums = loss_by_group(losses, chosen_N, group)
        rows += [{**row, "nats_per_word": row["nats"] / row["words"]} for row in found]
        clusters += sums
    return measure_result(
        "key_words",
        meaning=[
            f"Key words cost another model {threshold:g} nats less at its longest context within its "
            "training than at its shortest. The loss on them says whether this model gains there too. Which "
            "words are key depends on the chooser: compare models by the same chooser, and by more than one.",
        ],
        rows=rows,
        clusters=clusters,
        left_out=left_out,
    )
