"""The clusters that intervals are over: an author's documents stand or fall together.

Shape letters: N documents, K clusters.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def cluster_names(authors: Sequence[str | None], document_hashes: Sequence[str]) -> list[str]:
    """The cluster of each document: its author, or where none is stated the document itself."""
    return [
        f"document {digest}" if author is None else author
        for author, digest in zip(authors, document_hashes, strict=True)
    ]


def sums_by_cluster(values_N: npt.ArrayLike, clusters: Sequence[str]) -> npt.NDArray[np.float64]:
    """Float64 sums of each cluster's documents ``[K]``, in the order in which the clusters first occur."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    sums_K = np.zeros(len(numbers))
    np.add.at(sums_K, [numbers[name] for name in clusters], np.asarray(values_N, dtype=np.float64))
    return sums_K
