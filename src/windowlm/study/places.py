"""Where in the scored documents synthetic texts are put: the same places for every model.

A place is drawn by a hash of seed, length, document and number, so that it depends on nothing else.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from windowlm.study.subject import Subject


@dataclass(frozen=True)
class Place:
    """Bytes of a document that serve as background, from a character's start.

    Attributes:
        cluster: author, or the document without one.
        background: as many bytes as asked for.
        behind: bytes of the same document that follow them.
        generator: of what else is drawn here.
    """

    cluster: str
    background: bytes
    behind: bytes
    generator: np.random.Generator


def draw_places(subject: Subject, length: int, behind: int, count: int, seed: int) -> tuple[list[Place], int]:
    """Places of each author, and how many authors have no document so long.

    Args:
        subject: whose documents.
        length: bytes of background.
        behind: bytes behind it.
        count: places of each author, spread over the author's documents in turn.
        seed: of the draw.
    """
    documents: dict[str, list[str]] = {}
    for digest, cluster in zip(subject.losses.document_hashes, subject.losses.clusters, strict=True):
        documents.setdefault(cluster, [])
        if len(subject.data[digest]) >= length + behind + 8:
            documents[cluster].append(digest)
    places = []
    for cluster, digests in documents.items():
        for number in range(count if digests else 0):
            digest = digests[number % len(digests)]
            drawn = hashlib.sha256(f"{seed} {length} {digest} {number}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(drawn, "big"))
            data = subject.data[digest]
            start = character_start(data, int(generator.integers(0, len(data) - length - behind - 7)))
            end = character_start(data, start + length)
            stop = character_start(data, end + behind)
            places.append(Place(cluster, data[start:end], data[end:stop], generator))
    return places, sum(not digests for digests in documents.values())


def character_start(data: bytes, position: int) -> int:
    """The nearest position at or before ``position`` where a character of UTF-8 begins, or the end."""
    position = min(position, len(data))
    while 0 < position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return position
