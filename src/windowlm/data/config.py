"""Settings of the data."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from windowlm.setting_text import setting_text

DataName = Literal["stdlib", "text", "pg19", "wikitext-103", "enwik8", "tinystories", "fineweb-edu"]

MOST_WORKERS = 256
MOST_TOKENS_OF_A_BATCH = 2**28


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which documents, how they are split, and how they become batches.

    Attributes:
        name: `stdlib` is the source code of the running Python's standard library, `text` the user's own
            documents at `path`, the others are data sets of the Hugging Face hub.
        path: File, folder or glob of text, JSON lines or parquet. With a hub data set, a local copy of its
            repository.
        text_column: Column of JSON lines and parquet that holds the document.
        title_column: Column of the title, where there is one.
        author_column: Column of the author, where there is one.
        documents: Take only this many documents (of the training split where splits are given).
        exclude: JSON file of documents to leave out, a list of `{"author": ..., "title": ...}`; a field that
            is left away matches all.
        revision: Branch, tag or commit of a hub data set; null is the preset's.
        validation_fraction: Share of the documents, or of the bytes of a single document, for validation.
        test_fraction: Share for the test.
        split_seed: Another seed gives other splits.
        sequence_length: Inputs of a training sequence, in tokens.
        batch_size: Sequences a batch, those of all processes together; null is one for each process that
            reads, or for each group that shares a sequence.
        document_masking: Tokens of one document never see another's and positions restart with each (as in
            Llama 3, arXiv:2407.21783); false takes each training sequence for one document, end marks and
            what follows them included (as in GPT-3, arXiv:2005.14165).
        validation_tokens: Tokens of the validation split that validation during training reads; null is all.
        workers: Processes that assemble batches beside the training process.
        cache_dir: Where prepared data goes; null is `data/` of the clone.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: DataName = "stdlib"
    path: str | None = None
    text_column: str = "text"
    title_column: str = "title"
    author_column: str = "author"
    documents: int | None = None
    exclude: str | None = None
    revision: str | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    split_seed: int = 0
    sequence_length: int = 1024
    batch_size: int | None = None
    document_masking: bool = True
    validation_tokens: int | None = 65_536
    workers: int = 0
    cache_dir: str | None = None

    @property
    def rows(self) -> int:
        """Sequences a batch; a run of several processes settles `batch_size` before it reads."""
        return self.batch_size or 1

    def __post_init__(self) -> None:
        """Check ranges and relations.

        Raises:
            ValueError: A value out of range, or settings that contradict each other.
        """
        for field, smallest, good in (
            ("documents", 1, 10_000),
            ("sequence_length", 1, 1024),
            ("batch_size", 1, 4),
            ("validation_tokens", 2, 65_536),
            ("workers", 0, 0),
            ("split_seed", 0, 0),
        ):
            value = getattr(self, field)
            if value is not None and value < smallest:
                raise ValueError(f"{field}={value!r}: at least {smallest}; try {field}={good}")
        if self.workers > MOST_WORKERS:
            raise ValueError(f"workers={self.workers}: at most {MOST_WORKERS}; try workers=4")
        rows = self.rows
        if rows * self.sequence_length > MOST_TOKENS_OF_A_BATCH:
            good = max(MOST_TOKENS_OF_A_BATCH // self.sequence_length, 1)
            field, good = ("batch_size", good) if rows > 1 else ("sequence_length", 1024)
            raise ValueError(
                f"{field}={getattr(self, field)}: batch_size={rows} sequences of "
                f"sequence_length={self.sequence_length} tokens are more than {MOST_TOKENS_OF_A_BATCH:,} in "
                f"a batch; try {field}={good}"
            )
        for field in ("validation_fraction", "test_fraction"):
            value = getattr(self, field)
            if not 0 < value < 0.5:
                raise ValueError(f"{field}={value!r}: between 0 and 0.5, both excluded; try {field}=0.05")
        for field in ("exclude", "revision", "cache_dir"):
            value = getattr(self, field)
            if value is not None and not value.strip():
                raise ValueError(f"{field}={value}: empty; try {field}=null")
        for field in ("text_column", "title_column", "author_column"):
            if not getattr(self, field):
                raise ValueError(f"{field}=: empty; try {field}={field.removesuffix('_column')}")
        if self.name == "text" and not self.path:
            raise ValueError(
                f"path={setting_text(self.path)}: data=text reads a file or folder; try path=my_documents"
            )
        if self.name == "stdlib" and self.path is not None:
            raise ValueError(
                f"path={setting_text(self.path)}: data=stdlib finds its own files; try path=null"
            )
        if self.revision is not None and (self.name in ("stdlib", "text") or self.path is not None):
            raise ValueError(
                f"revision={setting_text(self.revision)}: only data of the hub has one; try revision=null"
            )
        if self.name == "fineweb-edu" and self.documents is None:
            raise ValueError(
                "documents=null: fineweb-edu is streamed up to a stated number; try documents=10000"
            )
