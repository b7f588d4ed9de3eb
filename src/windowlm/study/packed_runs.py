"""What is needed of finished runs in one archive, so that a study goes on where their weights are not."""

import fnmatch
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.data.unpacked_size import MOST_UNPACKED, most_unpacked_bytes
from windowlm.errors import UserError
from windowlm.evaluation.comparison import run_folders
from windowlm.evaluation.kept_nats import UNFINISHED
from windowlm.evaluation.target_losses import LOSSES_NAME
from windowlm.json_text import has_text, parse_json

if TYPE_CHECKING:
    import pyarrow

NAME = "runs.arrow.gz"
RECORD = "run.json"
SCORED = "scored.json"  # settings of each time that scripts/score_runs.py has scored the run
PART = re.compile(rf"{re.escape(NAME)}\.(\d+)-of-(\d+)")
# Of results and of W&B's files: neither weights, nor code that Python would import from the folder.
SUFFIXES = frozenset(
    {".json", ".jsonl", ".yaml", ".csv", ".html", ".png", ".parquet", ".diff", ".txt", ".log", ".wandb"}
)
LONGEST_PART = 255  # bytes of a name that a file may have
LEFT_OUT = ("checkpoints", UNFINISHED)
PAGES = (".html", ".png")
GZIP_FORMAT = 31  # zlib's window bits for a gzip header and the largest window


@dataclass(frozen=True)
class Unpacked:
    """What became of an archive.

    Attributes:
        runs: in it.
        written: files that were not there before.
        kept: files that were there with other content, and stay as they are.
    """

    runs: int
    written: int
    kept: list[str]


def pack_runs(
    folder: Path, out: Path, part_bytes: int, *, numbers: bool = False, losses_of: str | None = None
) -> tuple[int, list[Path]]:
    """Write an archive of the finished runs of a folder, cut into parts.

    It holds their settings, metrics, evaluations and measures, but neither weights nor states of training,
    nor the nats of single targets. An archive that ``out`` holds is replaced.

    Args:
        folder: of the runs, also in folders below.
        out: folder of the parts, which is made.
        part_bytes: largest size of a part.
        numbers: whether pages and pictures are left out.
        losses_of: pattern of the runs' names below ``folder``: the nats of the single targets of these runs
            are packed instead, and nothing else.

    Returns:
        How many runs are in it, and the parts.

    Raises:
        UserError: no finished run is there, or a file cannot be read or written, or not unpacked everywhere
            by its name.
    """
    finished = [run for run in run_folders(folder) if _is_finished(run)]
    if losses_of is not None:
        names = {run: run.relative_to(folder).as_posix() for run in finished}
        finished = [run for run in finished if fnmatch.fnmatchcase(names[run], losses_of)]
    files = [file for run in finished for file in _files(run, losses=losses_of is not None)]
    if numbers:
        files = [file for file in files if file.suffix not in PAGES]
    if not files:
        which = "" if losses_of is None else f" with losses.parquet whose name is like {losses_of}"
        raise UserError(f"{folder}: holds no finished run{which}")
    paths = {file.relative_to(folder).as_posix(): file for file in sorted(files)}
    for name in paths:
        if not has_text(name) or not _is_plain(name):
            raise UserError(f"{folder}: {name!r} holds a backslash or is no UTF-8; give it another name")
    try:
        contents = {name: file.read_bytes() for name, file in paths.items()}
        # Losses are compressed already.
        whole = _archive(contents, compression=6 if losses_of is None else 1)
        pieces = [whole[start : start + part_bytes] for start in range(0, len(whole), part_bytes)]
        out.mkdir(parents=True, exist_ok=True)
        parts = [out / f"{NAME}.{number}-of-{len(pieces)}" for number, _ in enumerate(pieces, start=1)]
        for part, piece in zip(parts, pieces, strict=True):
            write_atomically(part, piece)
        for earlier in set(_parts(out)) - set(parts):
            earlier.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}") from None
    return len(finished), parts


def unpack_runs(packed: Path, folder: Path) -> Unpacked:
    """Add the runs of an archive to a folder, in which nothing is overwritten.

    Args:
        packed: folder of the parts.
        folder: of the runs; made where it is missing.

    Raises:
        UserError: a part is missing or damaged, or holds what is no file of a run, or the folder holds
            another run, or an unfinished one, where a run of the archive belongs; nothing is written then.
    """
    entries = _read(packed)
    runs = [PurePosixPath(name).parent for name in entries if PurePosixPath(name).name == RECORD]
    for run in runs:
        here = folder / run / RECORD
        if here.is_file() and here.read_bytes() != entries[str(run / RECORD)]:
            raise UserError(
                f"{folder / run}: is another run than that of the archive, or not finished; nothing was "
                "overwritten: move it away, or unpack into another folder"
            )
    names = [name for name in entries if PurePosixPath(name).name == SCORED]
    scored = {
        name: (read_scored(folder / name), _settings_lists(entries[name], packed / name)) for name in names
    }
    written, kept = 0, []
    try:
        # The record of a run comes last: without it there is no run.
        for name in sorted(entries, key=lambda name: PurePosixPath(name).name == RECORD):
            path, data = folder / name, entries[name]
            if path.name == SCORED and path.is_file():
                known, others = scored[name]
                added = [each for each in others if each not in known]
                if added:
                    write_atomically(path, json_bytes([*known, *added]))
            elif not path.exists():
                write_atomically(path, data)
                written += 1
            elif path.read_bytes() != data:
                kept.append(name)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    return Unpacked(len(runs), written, kept)


def read_scored(path: Path) -> list[list[str]]:
    """Settings with which a run was scored, from its ``scored.json``; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    return _settings_lists(path.read_bytes(), path) if path.is_file() else []


def _is_finished(run: Path) -> bool:
    try:
        return bool(parse_json((run / RECORD).read_text(encoding="utf-8"))["status"] == "finished")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files(run: Path, *, losses: bool) -> Iterator[Path]:
    for file in run.rglob("*"):
        inside = file.relative_to(run).parts
        if not file.is_file() or file.is_symlink() or any(part in LEFT_OUT for part in inside):
            continue
        if file.name.startswith(".") or file.suffix not in SUFFIXES:
            continue  # locks, partial files, weights
        if (file.name == LOSSES_NAME) == losses:
            yield file


def _parts(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if PART.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: [int(number) for number in _numbers(path)])


def _numbers(part: Path) -> tuple[str, ...]:
    match = PART.fullmatch(part.name)
    assert match is not None
    return match.groups()


def _read(packed: Path) -> dict[str, bytes]:
    """Content of each file of the archive, by its path below the folder of the runs."""
    parts = _parts(packed)
    if not parts:
        raise UserError(f"{packed}: holds no {NAME}.1-of-N; give the folder that scripts/pack_runs.py wrote")
    count = int(_numbers(parts[0])[1])
    # The first alone: a name may speak of more parts than could be counted.
    names = (f"{NAME}.{number}-of-{count}" for number in range(1, count + 1))
    missing = next((name for name in names if not (packed / name).is_file()), None)
    if missing is not None or len(parts) != count:
        what = "parts of several archives" if missing is None else f"{missing} is missing"
        raise UserError(f"{packed}: {what}; take all parts of one archive along, and nothing else")
    try:
        entries = _entries(b"".join(part.read_bytes() for part in parts))
    except (OSError, EOFError, ValueError, NotImplementedError, KeyError, zlib.error) as error:
        raise UserError(f"{packed}: damaged ({error}); nothing was written") from None
    paths = [PurePosixPath(name) for name in entries]
    runs = {path.parent for path in paths if path.name == RECORD}
    folders = {parent for path in paths for parent in path.parents}
    for name, path in zip(entries, paths, strict=True):
        of_a_run = path.name == LOSSES_NAME or not runs.isdisjoint(path.parents)
        if not _is_plain(name) or path.suffix not in SUFFIXES or path in folders or not of_a_run:
            raise UserError(
                f"{packed}: {name[:LONGEST_PART]!r} is no file of a run, as scripts/pack_runs.py packs them; "
                "nothing was written: take an archive that it wrote"
            )
    return entries


def _is_plain(name: str) -> bool:
    """Whether it names one file below a folder, on every system, and has no other spelling."""
    path = PurePosixPath(name)
    return (
        str(path) == name
        and not path.is_absolute()
        and not any(part == ".." or len(part.encode()) > LONGEST_PART for part in path.parts)
        and not any(character in name for character in "\0\\")
    )


def _archive(files: Mapping[str, bytes], compression: int) -> bytes:
    """Files by name as an Arrow table, which nothing but their content comes out of; gzip tells damage."""
    import pyarrow
    import pyarrow.ipc

    stream = io.BytesIO()
    columns = {"name": list(files), "content": list(files.values())}
    table = pyarrow.table(columns, _schema())
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return gzip.compress(stream.getvalue(), compression, mtime=0)


def _schema() -> "pyarrow.Schema":
    import pyarrow

    return pyarrow.schema({"name": pyarrow.string(), "content": pyarrow.large_binary()})


def _entries(whole: bytes) -> dict[str, bytes]:
    """The files of ``_archive``.

    Raises:
        OSError, EOFError, ValueError, NotImplementedError, KeyError, zlib.error: it is something else, or
            damaged, or holds far more than results pack into one of its size.
    """
    import pyarrow.ipc

    unpacked = _unpacked(whole)
    with pyarrow.ipc.open_stream(unpacked) as stream:
        # Columns of other kinds, such as a dictionary's, may repeat one content many times.
        if stream.schema != _schema():
            raise ValueError("other columns than names and contents")
        if any(_is_compressed(message) for message in pyarrow.ipc.MessageReader.open_stream(unpacked)):
            raise ValueError("its columns are compressed once more, which those of results are not")
        table = stream.read_all()
        # Arrow reads where damaged offsets point to.
        table.validate(full=True)
    names, contents = table.column("name").to_pylist(), table.column("content").to_pylist()
    if None in names or None in contents or len(set(names)) < len(names):
        raise ValueError("a name or a content is missing, or a name is there twice")
    return dict(zip(names, contents, strict=True))


def _is_compressed(message: "pyarrow.ipc.Message") -> bool:
    """Whether what a message holds takes more room than the message, of which pyarrow does not tell.

    Its description is a flatbuffer, a table of tables (https://arrow.apache.org/docs/format/Columnar.html,
    Message.fbs): the third field of the message is its header, the fourth of a record batch its compression.
    """
    if message.type == "schema":
        return False
    description = message.metadata.to_pybytes()

    def number(at: int, size: int, signed: bool = False) -> int:
        return int.from_bytes(description[at : at + size], "little", signed=signed)

    def field(table: int, index: int) -> int | None:
        fields = table - number(table, 4, signed=True)
        at = 4 + 2 * index
        place = number(fields + at, 2) if at < number(fields, 2) else 0
        return table + place if place else None

    header = field(number(0, 4), 2)
    return (
        message.type != "record batch" or header is None or field(header + number(header, 4), 3) is not None
    )


def _unpacked(whole: bytes) -> bytes:
    most = most_unpacked_bytes(len(whole))
    unpacking = zlib.decompressobj(GZIP_FORMAT)
    content = unpacking.decompress(whole, most + 1)
    if len(content) > most:
        raise ValueError(f"it unpacks to more than {MOST_UNPACKED} times its size, which no results do")
    if not unpacking.eof:
        raise EOFError("its end is missing")
    return content


def _settings_lists(data: bytes, path: Path) -> list[list[str]]:
    try:
        found = parse_json(data)
        if isinstance(found, list) and all(isinstance(settings, list) for settings in found):
            return found
    except ValueError:
        pass
    raise UserError(f"{path}: damaged; remove it, and the run is looked at again")
