"""What of the far context a model uses: left out, shuffled in blocks, or of another author.

Every target keeps its near context of c to 2c - 1 tokens; only what lies before, back to C tokens, differs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from windowlm.evaluation.clusters import sums_by_cluster
from windowlm.evaluation.paired_difference import paired_difference
from windowlm.evaluation.result import bits_per_byte
from windowlm.evaluation.targets import Documents
from windowlm.study.measure_result import MeasureResult, measure_result
from windowlm.study.subject import Subject

CONDITIONS = ("intact", "left out", "shuffled", "another author")
FEWEST_BLOCKS = 4  # of a far context whose order is told by another one


def far_context(
    subject: Subject,
    documents: Documents,
    *,
    near: int,
    far: int,
    block: int,
    max_targets: int,
    seed: int,
) -> MeasureResult:
    """Bits per byte under each condition, and the paired difference from the intact context.

    Left out means that the model starts anew at the near context, as at a context length of c: a cut inside
    the layers of a model that was trained to see everything would break it, and measure the breakage.

    Args:
        subject: the scored run.
        documents: the split that it was scored on.
        near: c, tokens.
        far: C, tokens; longer than ``near``.
        block: bytes of a block that is shuffled.
        max_targets: targets, spread evenly over the documents.
        seed: of the shuffles.
    """
    assert near < far
    losses = subject.losses
    windows = _windows(subject, near, far, max_targets)
    hashes = {documents.document_hash(index): index for index in range(len(documents))}
    tokens_of = {
        number: documents.read(hashes[digest], 0, int(documents.lengths[hashes[digest]]) - 1).astype(np.int64)
        for number, digest in enumerate(losses.document_hashes)
    }
    strangers = {
        number: [other for other, name in enumerate(losses.clusters) if name != losses.clusters[number]]
        for number in tokens_of
    }
    left_out = []
    conditions = list(CONDITIONS)
    sizes_V = subject.tokenizer.token_bytes_V
    blocks = min(
        -(-int(sizes_V[tokens_of[number][first - far : first - near]].sum()) // block)
        for number, first, _ in windows
    )
    if blocks < FEWEST_BLOCKS:
        conditions.remove("shuffled")
        left_out.append(f"The far context is {blocks} blocks of {block} bytes, too few to be shuffled.")
    if not all(strangers.values()):
        conditions.remove("another author")
        left_out.append("All documents are one author's, so no far context is another's.")
    generator = np.random.default_rng(seed)
    sequences: dict[str, list[npt.NDArray[np.int64]]] = {name: [] for name in conditions}
    for number, first, end in windows:
        tokens = tokens_of[number]
        before, rest = tokens[first - far : first - near], tokens[first - near : end]
        sequences["intact"].append(tokens[first - far : end])
        sequences["left out"].append(rest)
        if "shuffled" in conditions:
            sequences["shuffled"].append(
                np.concatenate([shuffled_blocks(before, sizes_V, block, generator), rest])
            )
        if "another author" in conditions:
            stranger = tokens_of[int(generator.choice(strangers[number]))]
            start = int(generator.integers(0, len(stranger) - len(before) + 1))
            sequences["another author"].append(np.concatenate([stranger[start : start + len(before)], rest]))
    names = [losses.clusters[number] for number, _, _ in windows]
    sizes = sums_by_cluster(
        [int(sizes_V[tokens_of[number][first:end]].sum()) for number, first, end in windows],
        names,
    )
    bits = {}
    for name in conditions:
        context = near if name == "left out" else far
        nats = subject.tail_nats(sequences[name], [context] * len(windows))
        bits[name] = bits_per_byte(sums_by_cluster([float(np.sum(found)) for found in nats], names), sizes)
    rows: list[dict[str, Any]] = []
    for name in conditions:
        difference = None if name == "intact" else paired_difference(bits["intact"], bits[name])
        rows.append(
            {
                "far_context": name,
                "near": near,
                "far": far,
                "targets": sum(end - first for _, first, end in windows),
                "authors": len(sizes),
                "bits_per_byte": float(np.average(bits[name], weights=sizes)),
                "difference": None if difference is None else difference.mean,
                "difference_low": None if difference is None else difference.low,
                "difference_high": None if difference is None else difference.high,
            }
        )
    clusters = [
        {"far_context": name, "cluster": cluster, "bits_per_byte": float(values[place])}
        for name, values in bits.items()
        for place, cluster in enumerate(dict.fromkeys(names))
    ]
    return measure_result(
        "far_context",
        meaning=[_meaning(row, block) for row in rows[1:]],
        rows=rows,
        clusters=clusters,
        left_out=left_out,
    )


def shuffled_blocks(
    tokens: npt.NDArray[np.int64],
    token_bytes_V: npt.NDArray[np.int64],
    block: int,
    generator: np.random.Generator,
) -> npt.NDArray[np.int64]:
    """The tokens in another order of blocks; a token belongs to the block in which its last byte falls.

    A single block has no other order.
    """
    ends = np.cumsum(token_bytes_V[tokens])
    borders = np.searchsorted(ends, np.arange(block, int(ends[-1]), block), side="right")
    blocks = [piece for piece in np.split(tokens, borders) if len(piece)]
    order = as_it_was = np.arange(len(blocks))
    while len(blocks) > 1 and np.array_equal(order, as_it_was):
        order = generator.permutation(len(blocks))
    return np.concatenate([blocks[index] for index in order])


def _windows(subject: Subject, near: int, far: int, max_targets: int) -> list[tuple[int, int, int]]:
    """Document, first target and end of chunks of c targets, as many in each document as in any, or all."""
    losses = subject.losses
    first_targets = np.searchsorted(losses.document, np.arange(len(losses.document_hashes)))
    counts = np.bincount(losses.document)
    most = max(1, max_targets // (near * len(counts)))
    windows = []
    for number, (place, count) in enumerate(zip(first_targets, counts, strict=True)):
        start = int(losses.token[place])
        assert start >= far
        starts: Sequence[int] = range(start, start + int(count), near)
        windows += [(number, first, min(first + near, start + int(count))) for first in starts[:most]]
    return windows


def _meaning(row: dict[str, Any], block: int) -> str:
    low, high = row["difference_low"], row["difference_high"]
    undecided = low is None or high is None or low <= 0 <= high
    name = row["far_context"]
    amount = f"{abs(row['difference']):.4f} bits per byte"
    if name == "left out":
        if undecided:
            return "Leaving out the far context changes the loss by no amount that can be told from zero."
        if row["difference"] > 0:
            return f"The far context is worth {amount}: so much more is lost without it."
        return f"The far context harms: without it {amount} are gained."
    if name == "shuffled":
        if undecided:
            return f"Beyond blocks of {block} bytes the order of the far context cannot be told to matter."
        worth = "helps" if row["difference"] > 0 else "harms"
        return f"The order of the far context, beyond blocks of {block} bytes, {worth}: {amount}."
    if undecided:
        return "Another author's far context serves as well, as far as can be told."
    worse = "worse" if row["difference"] > 0 else "better"
    return f"Another author's far context is {worse} than the document's own by {amount}."
