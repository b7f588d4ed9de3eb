"""Loss of chosen targets by author and context length, with the change from the shortest and its interval.

Shape letters: N targets, K clusters.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from windowlm.evaluation.bootstrap_t import bootstrap_t
from windowlm.evaluation.clusters import sums_by_cluster
from windowlm.evaluation.target_losses import TargetLosses


def loss_by_group(
    losses: TargetLosses, chosen_N: npt.NDArray[np.bool_], group: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and the sums of each author.

    Few targets are unevenly spread over authors, so that the change, the mean over the authors who have any,
    is given with a bootstrap-t interval.

    Args:
        losses: nats of every target.
        chosen_N: which are meant.
        group: what to call them, repeated in every row.
    """
    names = list(dict.fromkeys(losses.clusters))
    bytes_K = sums_by_cluster(losses.by_document(losses.byte_count * chosen_N), losses.clusters)
    nats_K = {
        c: sums_by_cluster(losses.by_document(np.where(chosen_N, values_N, 0.0)), losses.clusters)
        for c, values_N in sorted(losses.nats.items())
    }
    has_K = bytes_K > 0
    byte_count = int(bytes_K.sum())
    per_byte_K = {c: values_K[has_K] / bytes_K[has_K] for c, values_K in nats_K.items()}
    shortest = min(nats_K)
    rows = []
    for c, values_K in nats_K.items():
        change = bootstrap_t(per_byte_K[c] - per_byte_K[shortest]) if has_K.any() and c != shortest else None
        total = math.fsum(values_K)
        rows.append(
            {
                **group,
                "context_length": c,
                "targets": int(chosen_N.sum()),
                "bytes": byte_count,
                "share_of_bytes": byte_count / int(losses.byte_count.sum()),
                "authors": int(has_K.sum()),
                "nats": total,
                "nats_per_byte": total / byte_count if byte_count else None,
                "change": None if change is None else change.mean,
                "change_low": None if change is None else change.low,
                "change_high": None if change is None else change.high,
            }
        )
    clusters = [
        {
            **group,
            "cluster": name,
            "bytes": int(bytes_K[place]),
            "nats": {str(c): float(values_K[place]) for c, values_K in nats_K.items()},
        }
        for place, name in enumerate(names)
        if has_K[place]
    ]
    return rows, clusters
