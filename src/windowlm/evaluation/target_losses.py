"""Nats of every target at every context length, kept so that later questions need no model.

Shape letters: N targets.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from windowlm.atomic_write import write_atomically
from windowlm.errors import UserError
from windowlm.evaluation.clusters import cluster_names
from windowlm.evaluation.targets import Documents, TargetSet

LOSSES_NAME = "losses.parquet"
_FACTS = b"windowlm"
_PROTOCOL, _NAIVE = "nats_", "naive_nats_"


@dataclass(frozen=True, kw_only=True)
class TargetLosses:
    """Every target with its place in the text and its nats.

    Attributes:
        targets_hash: of the set of targets.
        tokenizer_identity: hash of the tokenizer.
        document_hashes: the documents scored.
        authors: theirs, None where none is stated.
        document: int32 ``[N]``, number of the target's document in ``document_hashes``.
        token: int64 ``[N]``, token of the document that is the target.
        first_byte: int64 ``[N]``, the target's first UTF-8 byte in the document.
        byte_count: int32 ``[N]``, UTF-8 bytes of the target.
        nats: float64 ``[N]`` by context length.
        naive_nats: the same in windows of c tokens that do not overlap.
        scoring_key: what decides the nats besides the targets, the weights above all; None where not known.
        tokens_per_second: that the model read, where it was measured.
    """

    targets_hash: str
    tokenizer_identity: str
    document_hashes: list[str]
    authors: list[str | None]
    document: npt.NDArray[np.int32]
    token: npt.NDArray[np.int64]
    first_byte: npt.NDArray[np.int64]
    byte_count: npt.NDArray[np.int32]
    nats: dict[int, npt.NDArray[np.float64]]
    naive_nats: dict[int, npt.NDArray[np.float64]]
    scoring_key: str | None = None
    tokens_per_second: float | None = None

    @property
    def clusters(self) -> list[str]:
        """Cluster of each document."""
        return cluster_names(self.authors, self.document_hashes)

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Targets of the same document before each target."""
        _, first, counts = np.unique(self.document, return_index=True, return_counts=True)
        return np.arange(len(self.document)) - np.repeat(first, counts)

    def by_document(self, values_N: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Sums over the targets of each document, float64."""
        starts = np.searchsorted(self.document, np.arange(len(self.document_hashes)))
        return np.add.reduceat(values_N.astype(np.float64), starts)


def losses_of(
    targets: TargetSet,
    documents: Documents,
    token_bytes_V: npt.NDArray[np.int64],
    tokenizer_identity: str,
    nats: Mapping[int, npt.NDArray[np.float64]],
    naive_nats: Mapping[int, npt.NDArray[np.float64]],
) -> TargetLosses:
    """The nats that ``token_loss.target_nats`` gave for the windows of ``targets``, with their places."""
    regions = targets.regions
    bytes_by_region = [token_bytes_V[documents.read(r.document, r.first, r.end)] for r in regions]
    return TargetLosses(
        targets_hash=targets.hash,
        tokenizer_identity=tokenizer_identity,
        document_hashes=[region.document_hash for region in regions],
        authors=[documents.author(region.document) for region in regions],
        document=np.repeat(np.arange(len(regions), dtype=np.int32), [r.end - r.first for r in regions]),
        token=np.concatenate([np.arange(r.first, r.end) for r in regions]),
        first_byte=np.concatenate(
            [r.first_byte + np.cumsum(b) - b for r, b in zip(regions, bytes_by_region, strict=True)]
        ),
        byte_count=np.concatenate(bytes_by_region).astype(np.int32),
        nats=dict(nats),
        naive_nats=dict(naive_nats),
    )


def write_losses(path: Path, losses: TargetLosses) -> None:
    """Write a parquet file of one row a target, with columns ``nats_C`` and ``naive_nats_C``.

    The numbers are float64, so that sums over the file equal those of the evaluation to the bit.
    """
    import pyarrow
    import pyarrow.parquet

    facts = {
        "targets_hash": losses.targets_hash,
        "tokenizer_identity": losses.tokenizer_identity,
        "document_hashes": losses.document_hashes,
        "authors": losses.authors,
        "scoring_key": losses.scoring_key,
        "tokens_per_second": losses.tokens_per_second,
    }
    columns: dict[str, Any] = {
        "document": losses.document,
        "token": losses.token,
        "first_byte": losses.first_byte,
        "byte_count": losses.byte_count,
        **{f"{_PROTOCOL}{c}": values_N for c, values_N in losses.nats.items()},
        **{f"{_NAIVE}{c}": values_N for c, values_N in losses.naive_nats.items()},
    }
    table = pyarrow.table(columns).replace_schema_metadata({_FACTS: json.dumps(facts)})
    # Nats of neighbours share their leading bytes, which compress once they stand together.
    split = {name: "BYTE_STREAM_SPLIT" for name in columns if name.startswith((_PROTOCOL, _NAIVE))}
    write_atomically(
        path,
        lambda file: pyarrow.parquet.write_table(
            table, file, compression="zstd", use_dictionary=False, column_encoding=split
        ),
    )


def read_losses(path: Path, advice: str = "score the run again") -> TargetLosses:
    """Read what ``write_losses`` wrote.

    Args:
        path: the file.
        advice: what mends a missing or damaged one.

    Raises:
        UserError: the file is missing, damaged or of something else.
    """
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise UserError(f"{path}: there is no such file, so nats of single targets are not known; {advice}")
    try:
        table = pyarrow.parquet.read_table(path)
        facts = json.loads(table.schema.metadata[_FACTS])
        column = {name: table.column(name).to_numpy() for name in table.column_names}
        return TargetLosses(
            **facts,
            document=column["document"],
            token=column["token"],
            first_byte=column["first_byte"],
            byte_count=column["byte_count"],
            nats=_by_length(column, _PROTOCOL),
            naive_nats=_by_length(column, _NAIVE),
        )
    except (pyarrow.ArrowException, KeyError, TypeError, ValueError, OSError):
        raise UserError(f"{path}: damaged, or not the losses of an evaluation; {advice}") from None


def _by_length(column: Mapping[str, npt.NDArray[Any]], prefix: str) -> dict[int, npt.NDArray[np.float64]]:
    names: Sequence[str] = [name for name in column if name.startswith(prefix)]
    return {int(name.removeprefix(prefix)): column[name] for name in names}
