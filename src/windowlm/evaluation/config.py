"""Settings of the evaluation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from windowlm.data.config import DataName
from windowlm.setting_text import setting_text

LARGEST_COUNT = 2**62  # sums of two fit into 64 bits


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Perplexity against context length.

    Args:
        context_lengths: tokens of context c, increasing; a target sees c to 2c - 1 tokens. Null takes five
            powers of two that end at half the sequence length of the run (or lower, where documents are
            short).
        max_targets: tokens scored at each context length, spread over the documents; null scores every
            token that has the longest context.
        max_targets_per_document: tokens scored of each document, the first that have the longest context;
            null for no such bound.
        bytes_per_author: target bytes of each author (of each document without one) instead of
            ``max_targets``; authors who have fewer are left out.
        targets: ``targets.json`` of another evaluation, such as that of a model with another tokenizer: the
            tokens that lie wholly in its bytes are scored, and no budget is given.
        split: documents of the run's data to score.
        precision: Lightning's name, or ``64-true``; 16-mixed needs a GPU.
        batch_tokens: tokens in one forward pass; one window that is longer goes alone.
        streaming: contexts that hold all that a windowed model can see are scored in one pass with a rolling
            cache; false scores each in windows of its own, with the same losses.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    context_lengths: list[int] | None = None
    max_targets: int | None = 16_384
    max_targets_per_document: int | None = None
    bytes_per_author: int | None = None
    targets: str | None = None
    split: Literal["validation", "test"] = "validation"
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    batch_tokens: int = 16_384
    streaming: bool = True

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a value out of range.
        """
        lengths = self.context_lengths
        if lengths is not None and (not lengths or lengths[0] < 1 or lengths != sorted(set(lengths))):
            good = sorted({length for length in lengths if length > 0}) or [64, 128, 256]
            raise ValueError(
                f"context_lengths={setting_text(lengths)}: whole numbers from 1 on, each once, in increasing "
                f"order; try context_lengths={setting_text(good)}"
            )
        if self.max_targets is not None and self.max_targets < 1:
            raise ValueError(
                f"max_targets={self.max_targets}: at least 1, or null for every token that has the longest "
                "context; try max_targets=16384"
            )
        if self.max_targets_per_document is not None and self.max_targets_per_document < 1:
            raise ValueError(
                f"max_targets_per_document={self.max_targets_per_document}: at least 1, or null for no "
                "bound; try max_targets_per_document=65536"
            )
        if self.bytes_per_author is not None and self.bytes_per_author < 1:
            raise ValueError(
                f"bytes_per_author={self.bytes_per_author}: at least 1, or null for no such rule; "
                "try bytes_per_author=25000"
            )
        if self.bytes_per_author is not None and self.max_targets is not None:
            raise ValueError(
                f"max_targets={self.max_targets}: bytes_per_author={self.bytes_per_author} states the budget "
                "already; try max_targets=null"
            )
        if self.bytes_per_author is not None and self.max_targets_per_document is not None:
            raise ValueError(
                f"max_targets_per_document={self.max_targets_per_document}: "
                f"bytes_per_author={self.bytes_per_author} states the budget already; "
                "try max_targets_per_document=null"
            )
        for name in ("max_targets", "max_targets_per_document", "bytes_per_author", "batch_tokens"):
            if (number := getattr(self, name)) is not None and number > LARGEST_COUNT:
                raise ValueError(
                    f"{name}={number}: no text is that long; at most {LARGEST_COUNT}; "
                    f"try {name}={LARGEST_COUNT}"
                )
        for name in ("max_targets", "max_targets_per_document", "bytes_per_author"):
            if self.targets is not None and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value}: targets={self.targets} says what is scored already; try {name}=null"
                )
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens={self.batch_tokens}: at least 1; try batch_tokens=16384")


@dataclass(frozen=True, kw_only=True)
class ScoredDataConfig:
    """Documents that a finished run is scored on; without a name and a path those of its own split.

    Args:
        name: a data set by name, all of its documents.
        path: file, folder or glob, all of its documents.
        text_column: column of JSON lines and parquet that holds the document.
        title_column: column of the title.
        author_column: column of the author.
        documents: take only this many.
        exclude: JSON file of documents to leave out.
        only: JSON file of the documents to score, such as the list that the training left out.
        revision: branch, tag or commit of a hub data set.
        cache_dir: where prepared data goes.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: DataName | None = None
    path: str | None = None
    text_column: str | None = None
    title_column: str | None = None
    author_column: str | None = None
    documents: int | None = None
    exclude: str | None = None
    only: str | None = None
    revision: str | None = None
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        """Check relations.

        Raises:
            ValueError: a setting of other documents, which are not named.
        """
        for field, value in self.given().items():
            if self.name is None and self.path is None and field != "cache_dir":
                raise ValueError(
                    f"{field}={value}: the run's own documents are read as in the run; give data.path or "
                    f"data.name with it, or leave it away; try {field}=null"
                )

    def given(self) -> dict[str, str | int]:
        """The settings that are not null."""
        return {name: value for name, value in vars(self).items() if value is not None}
