"""The fixed target set: the same bytes at every context length, and for every model with the same tokenizer.

In a document of n tokens the targets are the tokens from position C on, where C is the longest context
length, so that each of them has the longest context; end marks are not scored. At context length c windows
of up to 2c tokens tile that region, and the second half of each is scored: a target has between c and
2c - 1 tokens of context, all of its own document.

C counts tokens, so with another tokenizer the targets of a document start at another byte, and where a
budget ends them they end at another. The hash of the byte ranges tells: evaluations with equal hashes scored
the same text and may be paired. With another tokenizer the targets of the first can be taken over as bytes;
the tokens wholly inside them are all of that text but for a few bytes at its ends.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from windowlm.errors import UserError
from windowlm.evaluation.clusters import cluster_names
from windowlm.json_text import parse_json


class TokenReader(Protocol):
    """Where the tokens of windows are read."""

    def read(self, document: int, start: int, stop: int) -> npt.NDArray[Any]:
        """Token ids ``start`` to ``stop`` of a document."""
        ...


class Documents(TokenReader, Protocol):
    """What the evaluation reads of a split: documents of tokens, each with the end mark last."""

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, end mark included."""
        ...

    def __len__(self) -> int:
        """Number of documents."""
        ...

    def document_hash(self, document: int) -> str:
        """Hash of a document's text."""
        ...

    def title(self, document: int) -> str | None:
        """Title, where the source has one."""
        ...

    def author(self, document: int) -> str | None:
        """Author, where the source has one."""
        ...


@dataclass(frozen=True)
class TargetRegion:
    """The targets of one document: tokens ``first`` to ``end``, one past the last.

    ``first_byte`` and ``end_byte`` delimit the same text in UTF-8 bytes of the document.
    """

    document: int
    document_hash: str
    first: int
    end: int
    first_byte: int
    end_byte: int


@dataclass(frozen=True)
class TargetSet:
    """Regions in the order of the document hash, and how many documents have none.

    ``authors_too_short`` counts authors whose documents together lack the bytes asked of each. ``within`` is
    the hash of the targets whose bytes these were chosen from, if they were.
    """

    regions: tuple[TargetRegion, ...]
    longest_context: int
    documents_too_short: int
    documents_over_budget: int
    authors_too_short: int = 0
    within: str | None = None

    @property
    def target_count(self) -> int:
        """Tokens scored at each context length."""
        return sum(region.end - region.first for region in self.regions)

    @property
    def byte_ranges(self) -> list[dict[str, Any]]:
        """The targets as bytes of documents, in which they can be found without the tokenizer."""
        return [
            {"document_hash": region.document_hash, "start": region.first_byte, "end": region.end_byte}
            for region in self.regions
        ]

    @property
    def hash(self) -> str:
        """SHA-256 of the byte ranges: two evaluations with the same hash scored the same text."""
        return hash_of_ranges(self.byte_ranges)


@dataclass(frozen=True)
class ScoredWindow:
    """Tokens ``start`` to ``end`` of a document, of which ``first`` to ``end`` are scored."""

    document: int
    start: int
    first: int
    end: int


def choose_targets(
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    longest_context: int,
    max_targets: int | None,
    max_targets_per_document: int | None = None,
    bytes_per_author: int | None = None,
) -> TargetSet:
    """Target regions of the documents that are longer than the longest context.

    A budget goes to documents in the order of their hash, which is a random order that depends on nothing
    but the documents: as many of them as can have ``longest_context`` targets each (or all theirs), then as
    evenly as their lengths allow.

    Bytes per author, the cluster of the intervals, go to an author's documents in the order of their hash,
    each to its end before the next; a token that would exceed them is left out. Authors who lack them are
    left out at every length, so that each author counts for as much text as any other.

    Args:
        documents: the split.
        token_bytes_V: UTF-8 bytes that each token stands for.
        longest_context: tokens before the first target, C.
        max_targets: largest number of targets; None for all.
        max_targets_per_document: largest number in a document; None for all.
        bytes_per_author: target bytes of each author, instead of a largest number; None for no such rule.
    """
    assert bytes_per_author is None or (max_targets is None and max_targets_per_document is None)
    available = np.asarray(documents.lengths, dtype=np.int64) - 1 - longest_context
    if max_targets_per_document is not None:
        available = np.minimum(available, max_targets_per_document)
    order = sorted(np.flatnonzero(available > 0).tolist(), key=documents.document_hash)
    authors_too_short = 0
    if bytes_per_author is None:
        shares = _spread(available[order], longest_context, max_targets)
    else:
        shares, authors_too_short = _equal_bytes(
            documents, token_bytes_V, longest_context, order, bytes_per_author
        )
    regions = []
    for index, share in zip(order, shares.tolist(), strict=True):
        if share == 0:
            continue
        end = longest_context + share
        bytes_up_to = np.cumsum(token_bytes_V[documents.read(index, 0, end)])
        regions.append(
            TargetRegion(
                document=index,
                document_hash=documents.document_hash(index),
                first=longest_context,
                end=end,
                first_byte=int(bytes_up_to[longest_context - 1]),
                end_byte=int(bytes_up_to[-1]),
            )
        )
    return TargetSet(
        regions=tuple(regions),
        longest_context=longest_context,
        documents_too_short=len(documents) - len(order),
        documents_over_budget=len(order) - len(regions),
        authors_too_short=authors_too_short,
    )


def hash_of_ranges(byte_ranges: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of targets as bytes of documents."""
    canonical = json.dumps(byte_ranges, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def targets_in_bytes(
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    longest_context: int,
    byte_ranges: Sequence[Mapping[str, Any]],
) -> TargetSet:
    """The tokens that lie wholly in the bytes that another evaluation scored.

    Args:
        documents: the split, which holds the documents of the ranges.
        token_bytes_V: UTF-8 bytes that each token stands for.
        longest_context: tokens before the first target, C.
        byte_ranges: of the other evaluation's targets.

    Raises:
        UserError: a document is not here or shorter than its range, a range has fewer than C tokens before
            it, or none holds a whole token.
    """
    index_of = {documents.document_hash(index): index for index in range(len(documents))}
    regions = []
    for number, each in enumerate(byte_ranges, start=1):
        index = index_of.get(each["document_hash"])
        if index is None:
            raise UserError(
                f"evaluation.targets: document {number} of {len(byte_ranges)} is not among the "
                f"{len(documents)} that are scored here; score the documents of that evaluation"
            )
        sizes = token_bytes_V[documents.read(index, 0, int(documents.lengths[index]) - 1)]
        ends = np.cumsum(sizes)
        if each["end"] > ends[-1]:
            raise UserError(
                f"evaluation.targets: document {number} of {len(byte_ranges)} has {ends[-1]:,} bytes and its "
                f"targets end at {each['end']:,}; give targets.json of an evaluation of these documents"
            )
        first = int(np.searchsorted(ends - sizes, each["start"]))
        end = int(np.searchsorted(ends, each["end"], side="right"))
        if first < longest_context:
            raise UserError(
                f"evaluation.context_lengths: the targets of {documents.title(index) or 'a document'} have "
                f"{first} tokens before them, and the longest context has {longest_context}; try shorter "
                "ones, or a set of targets that begins later"
            )
        if end > first:
            regions.append(
                TargetRegion(
                    document=index,
                    document_hash=each["document_hash"],
                    first=first,
                    end=end,
                    first_byte=int(ends[first] - sizes[first]),
                    end_byte=int(ends[end - 1]),
                )
            )
    if not regions:
        raise UserError(
            "evaluation.targets: no token of this tokenizer lies wholly in them; give targets of longer text"
        )
    return TargetSet(
        regions=tuple(regions),
        longest_context=longest_context,
        documents_too_short=0,
        documents_over_budget=len(documents) - len(regions),
        within=hash_of_ranges(byte_ranges),
    )


def read_byte_ranges(path: Path) -> list[dict[str, Any]]:
    """Targets as bytes of documents, from the ``targets.json`` of an evaluation.

    Raises:
        UserError: the file is missing, damaged or of something else.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        ranges = [
            {
                "document_hash": str(each["document_hash"]),
                "start": int(each["start"]),
                "end": int(each["end"]),
            }
            for each in content["documents"]
        ]
        sound = bool(ranges) and hash_of_ranges(ranges) == content["hash"] and _are_apart(ranges)
    except OSError as error:
        raise UserError(
            f"evaluation.targets={path}: {error.strerror}; give targets.json of an evaluation"
        ) from None
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(
            f"evaluation.targets={path}: damaged, or not the targets of an evaluation; give targets.json of "
            "one"
        )
    return ranges


def _are_apart(ranges: Sequence[Mapping[str, Any]]) -> bool:
    """Whether each range holds a byte, and no byte is in two."""
    ordered = sorted((each["document_hash"], each["start"], each["end"]) for each in ranges)
    overlap = any(one[0] == other[0] and one[2] > other[1] for one, other in pairwise(ordered))
    return not overlap and all(0 <= start < end for _, start, end in ordered)


def protocol_windows(regions: Sequence[TargetRegion], context_length: int) -> list[ScoredWindow]:
    """Windows of up to 2c tokens whose second halves tile the regions."""
    windows = [
        ScoredWindow(region.document, first - context_length, first, min(first + context_length, region.end))
        for region in regions
        for first in range(region.first, region.end, context_length)
    ]
    assert_tiled(regions, windows)
    return windows


def naive_windows(regions: Sequence[TargetRegion], context_length: int) -> list[ScoredWindow]:
    """The usual non-overlapping windows: a target sees 1 to c tokens, the first of a window only one."""
    windows = [
        ScoredWindow(region.document, first - 1, first, min(first + context_length, region.end))
        for region in regions
        for first in range(region.first, region.end, context_length)
    ]
    assert_tiled(regions, windows)
    return windows


def assert_tiled(regions: Sequence[TargetRegion], windows: Sequence[ScoredWindow]) -> None:
    """Check that the windows score every token of the regions once, in order, and nothing else."""
    remaining: Iterator[ScoredWindow] = iter(windows)
    for region in regions:
        position = region.first
        while position < region.end:
            window = next(remaining)
            assert window.document == region.document
            assert 0 <= window.start < window.first == position < window.end <= region.end
            position = window.end
    assert next(remaining, None) is None


def _spread(available: npt.NDArray[np.int64], least: int, budget: int | None) -> npt.NDArray[np.int64]:
    """Targets of each document: at most ``budget`` together, as even as ``available`` allows."""
    if budget is None or available.sum() <= budget:
        return available
    chosen = max(1, int(np.searchsorted(np.cumsum(np.minimum(available, least)), budget, side="right")))
    level, too_high = 0, budget + 1
    while too_high - level > 1:
        middle = (level + too_high) // 2
        if np.minimum(available[:chosen], middle).sum() <= budget:
            level = middle
        else:
            too_high = middle
    shares = np.minimum(available, level)
    shares[chosen:] = 0
    return shares


def _equal_bytes(
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    longest_context: int,
    order: Sequence[int],
    bytes_per_author: int,
) -> tuple[npt.NDArray[np.int64], int]:
    """Targets of each document in ``order``, and how many authors have too few bytes."""
    hashes = [documents.document_hash(index) for index in order]
    clusters = cluster_names([documents.author(index) for index in order], hashes)
    left = dict.fromkeys(clusters, bytes_per_author)
    full: set[str] = set()
    shares = np.zeros(len(order), dtype=np.int64)
    for place, (index, cluster) in enumerate(zip(order, clusters, strict=True)):
        if cluster in full:
            continue
        tokens = documents.read(index, longest_context, int(documents.lengths[index]) - 1)
        bytes_up_to = np.cumsum(token_bytes_V[tokens])
        shares[place] = np.searchsorted(bytes_up_to, left[cluster], side="right")
        if bytes_up_to[-1] >= left[cluster]:
            full.add(cluster)
        left[cluster] -= int(bytes_up_to[shares[place] - 1]) if shares[place] else 0
    shares[[cluster not in full for cluster in clusters]] = 0
    return shares, len(left) - len(full)
