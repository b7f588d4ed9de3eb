"""Data sets of the Hugging Face hub, from repositories that hold parquet files.

`data.path` may name a local copy of such a repository, for machines without a network.
"""

from __future__ import annotations

import glob
import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import disable_progress_bars

from windowlm.atomic_write import write_atomically
from windowlm.data.arrow_store import cache_folder
from windowlm.data.config import DataConfig
from windowlm.data.documents import Document, Source, Split
from windowlm.data.errors import DataError
from windowlm.data.identity import file_states, hash_of
from windowlm.data.readers import InMemory, TextFile, parquet_rows, text_of

_TIMEOUT_SECONDS = 10
# The client below huggingface_hub is requests, httpx or another one, by version; its errors derive from the
# base that HfHubHTTPError shares with them, and need not be OSErrors.
_NETWORK_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True)
class Preset:
    """Where a data set lies and how its rows become documents.

    Attributes:
        repository: Name on the hub.
        files: Glob of the parquet files of each split, in the order of reading: where splits share a
            document, the first keeps it. `train` alone is split by document hash.
        revision: Branch, tag or commit that is read unless `data.revision` says otherwise.
        title_column: Column of the document's title where there is no `data.title_column`.
        rows: `documents` where a row is one, `articles` where rows are lines of Wikipedia articles,
            `one` where all rows are one document, cut by position.
        streamed: Read over the network instead of downloading all files first.
    """

    repository: str
    files: dict[Split, str]
    revision: str = "main"
    title_column: str = "title"
    rows: Literal["documents", "articles", "one"] = "documents"
    streamed: bool = False


def _three_splits(folder: str) -> dict[Split, str]:
    return {
        "test": f"{folder}/test-*.parquet",
        "validation": f"{folder}/validation-*.parquet",
        "train": f"{folder}/train-*.parquet",
    }


PRESETS = {
    "pg19": Preset("emozilla/pg19", _three_splits("data"), title_column="short_book_title"),
    "wikitext-103": Preset("Salesforce/wikitext", _three_splits("wikitext-103-raw-v1"), rows="articles"),
    "enwik8": Preset(
        # The hub's own conversion to parquet: the repository itself holds a script.
        "LTCB/enwik8",
        {"train": "enwik8-raw/train/*.parquet"},
        revision="refs/convert/parquet",
        rows="one",
    ),
    "tinystories": Preset(
        "roneneldan/TinyStories",
        {"validation": "data/validation-*.parquet", "train": "data/train-*.parquet"},
    ),
    "fineweb-edu": Preset("HuggingFaceFW/fineweb-edu", {"train": "sample/10BT/*.parquet"}, streamed=True),
}


def find_hub_source(data: DataConfig) -> Source:
    """The documents of a preset, from the hub or from a local copy.

    Raises:
        DataError: The local copy lacks files, or the hub cannot be reached.
    """
    preset = PRESETS[data.name]
    if data.path is not None:
        return _local_source(data, preset, Path(data.path).expanduser())
    commit = _resolve_revision(preset.repository, data.revision or preset.revision, cache_folder(data))
    return Source(
        name=f"{preset.repository} at {commit[:12]}",
        key=hash_of(preset, commit, *_columns(data)),
        documents=lambda: _hub_documents(data, preset, commit),
        revision=commit,
    )


def _local_source(data: DataConfig, preset: Preset, path: Path) -> Source:
    if preset.rows == "one" and path.is_file():
        files = [path]
        document = Document(read=TextFile(path), title=path.name)
        key = hash_of(preset, file_states(files))
        return Source(name=str(path), key=key, documents=lambda: iter([document]))
    files = [file for pattern in preset.files.values() for file in sorted(path.glob(pattern))]
    for split, pattern in preset.files.items():
        if not any(path.glob(pattern)):
            raise DataError(
                f"data.path={data.path!r}: no file {pattern} for the {split} split; with data={data.name} "
                f"the path is a local copy of {preset.repository} (leave data.path away to download it)"
            )
    return Source(
        name=f"{data.name} at {path}",
        key=hash_of(preset, file_states(files), *_columns(data)),
        documents=lambda: _documents(glob.escape(str(path)), preset, data),
    )


def _columns(data: DataConfig) -> tuple[str, str, str]:
    return data.text_column, data.title_column, data.author_column


def _hub_documents(data: DataConfig, preset: Preset, commit: str) -> Iterator[Document]:
    """Documents over the network, or of files that the hub's own cache keeps."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    root = f"hf://datasets/{preset.repository}@{commit}"
    try:
        if not preset.streamed:
            folder = snapshot_download(
                preset.repository,
                repo_type="dataset",
                revision=commit,
                allow_patterns=list(preset.files.values()),
            )
            root = glob.escape(folder)
        yield from _documents(root, preset, data)
    except _NETWORK_ERRORS as error:
        raise DataError(_unreachable(preset.repository, error)) from error


def _documents(root: str, preset: Preset, data: DataConfig) -> Iterator[Document]:
    """Documents of the files below `root`, the beginning of a glob."""
    for split, pattern in preset.files.items():
        stated = split if len(preset.files) > 1 else None
        rows = _Rows(f"{root}/{pattern}", (*_columns(data), preset.title_column))
        if preset.rows == "one":
            yield Document(read=rows.joined, title=data.name)
        elif preset.rows == "articles":
            for heading, text in join_articles(text for text, _ in rows):
                yield Document(read=InMemory(text), title=heading, split=stated)
        else:
            for text, row in rows:
                title = row.get(data.title_column, row.get(preset.title_column))
                author = row.get(data.author_column)
                yield Document(
                    read=InMemory(text),
                    title=None if title is None else str(title),
                    author=None if author is None else str(author),
                    split=stated,
                )


@dataclass(frozen=True)
class _Rows:
    """Rows of parquet files with their text, which is in the first of the columns."""

    files: str
    columns: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, row in enumerate(parquet_rows(self.files, *self.columns), start=1):
            yield text_of(row, self.columns[0], f"row {number} of {self.files!r}"), row

    def joined(self) -> Iterator[str]:
        """All rows as the lines of one document."""
        for number, (text, _) in enumerate(self):
            yield ("\n" if number else "") + text


_ARTICLE_HEADING = re.compile(r" = (?!= )(.*\S) = \n?")


def join_articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Reassemble WikiText's articles (Merity et al. 2016), whose rows are lines.

    An article starts at a heading of the first level, ` = Title = `, between blank lines. The rows of blank
    lines are empty on the hub and ` \\n` in the original file, which is what comes back.

    Yields:
        Title and text of each article.
    """
    rows = iter(lines)
    title: str | None = None
    article: list[str] = []
    before, line = "", next(rows, "")
    for after in chain(rows, [""]):
        heading = _ARTICLE_HEADING.fullmatch(line)
        if heading and not before.strip() and not after.strip():
            if title is not None:
                yield title, "".join(article)
                article = []
            title = heading[1]
        article.append(line or " \n")
        before, line = line, after
    if title is not None:
        yield title, "".join(article)


def _resolve_revision(repository: str, revision: str, folder: Path) -> str:
    """The commit of a revision; without a network, the one that an earlier run resolved it to."""
    record = folder / "revisions" / f"{hash_of(repository, revision)}.json"
    try:
        commit = HfApi().dataset_info(repository, revision=revision, timeout=_TIMEOUT_SECONDS).sha
    except _NETWORK_ERRORS as error:
        with suppress(OSError, ValueError, KeyError, TypeError):  # where there is none, or it is damaged
            return str(json.loads(record.read_text(encoding="utf-8"))["commit"])
        raise DataError(_unreachable(repository, error)) from error
    resolved = {"repository": repository, "revision": revision, "commit": commit}
    write_atomically(record, json.dumps(resolved).encode("utf-8"))
    return str(commit)


def _unreachable(repository: str, error: Exception) -> str:
    return (
        f"data: {repository} could not be read from the hub ({type(error).__name__}: {error}); without a "
        "network give your own text, data.path=FILE_OR_FOLDER, or a local copy of the repository with "
        "data=NAME data.path=COPY"
    )
