"""The folder of a run: what it holds, whether it may be written, and where a resumed run goes on.

This module loads no torch: a folder that cannot be used is refused before any work.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from windowlm.atomic_write import json_bytes, write_atomically
from windowlm.config import ConfigError, TrainConfig, settings_of
from windowlm.errors import USAGE_ERROR, UserError
from windowlm.json_text import parse_json
from windowlm.model_folder import WEIGHTS_NAME
from windowlm.setting_text import flattened, setting_text

# In the folder of checkpoints: the last state of training, the one before it, the best, and a damaged one
# that was set aside.
LAST, PREVIOUS, BEST, DAMAGED = "last.ckpt", "previous.ckpt", "best.ckpt", "damaged.ckpt"

# Settings that a resumed run may change: they do not decide what is learnt from which text in which order.
CHANGEABLE = (
    "resume",
    "plan",
    "run_dir",
    "logger",
    "checkpoint",
    "evaluation",
    "data.workers",
    "data.cache_dir",
    "trainer.max_steps",
    "trainer.max_tokens",
    "trainer.max_seconds",
    "trainer.max_time",
    "trainer.device",
    "trainer.devices",
    "parallel",
    "trainer.max_skipped_steps",
    "trainer.log_every_n_steps",
    "trainer.progress_bar",
)

ROWS = "data.batch_size"

# What a run that starts from another's state must share with it: the shapes of the weights, and the size of a
# batch, in which the state counts tokens and text that is used.
SHARED_WITH_ORIGIN = (
    "model.",
    "tokenizer.",
    "data.sequence_length",
    ROWS,
    "trainer.accumulate_batches",
)

# Entry of the record of a run that has saved a state.
HAS_SAVED = "has_saved"

# How the code differed from its commit, as git says it.
DIFF = "changes.diff"

# Empty, and locked by the process that writes the folder.
LOCK = ".lock"

# What may have been written into a folder before its run began, by Hydra and by a run that was killed.
WRITTEN_BEFORE_A_RUN = re.compile(r"\.hydra(-\d+)?|train\.log|\.lock|\.run\.json\.partial-\d+")
WRITTEN_BESIDE_RUNS = re.compile(
    r"\d+|multirun\.yaml|(comparison|settings).*\.(csv|png|html|json)|ablation\.(json|png)"
)

# Entries of the record that are texts. Of an id of W&B names of files and folders are made.
TEXTS = {
    "origin": (re.compile(r".*", re.DOTALL), "a text"),
    "wandb_id": (re.compile(r"[\w-]+"), "a text of letters, digits, - and _"),
}

# Somebody may have put something else under these names.
FILES = (
    *("run.json", "config.json", "metrics.jsonl", "metrics.csv", DIFF, LOCK),
    *(f"checkpoints/{name}" for name in (LAST, PREVIOUS, BEST, DAMAGED)),
)
FOLDERS = ("checkpoints", "model", "evaluation", "replay", "wandb")

CONTENTS = {
    "model": "weights (safetensors), configuration and tokenizer, for windowlm.load",
    "evaluation": "loss by context length: report.html, length.json, .csv, .png, targets and their losses",
    "metrics.jsonl": "one JSON object a logged step",
    "metrics.csv": "the same as a table",
    "checkpoints": "last two states of training and the best, for resume=auto",
    "replay": "steps that were not finite, for scripts/replay_batch.py",
    "config.json": "every setting of the run",
    "run.json": "status, versions, git commit, data and tokenizer hashes",
    "scored.json": "settings with which scripts/score_runs.py has scored it",
    DIFF: "how the code differed from its commit",
    ".hydra": "what was composed from which overrides",
    "wandb": "the run as W&B keeps it",
}


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run begins.

    Attributes:
        checkpoints: states to go on from, the newest first; none for a fresh start.
        continues: the run in this folder goes on; otherwise the folder is new.
        finished: it has nothing left to do.
        wandb_id: id of the W&B run to continue.
        origin: folder of the run whose state this one starts from, until it has one of its own.
    """

    checkpoints: tuple[Path, ...] = ()
    continues: bool = False
    finished: bool = False
    wandb_id: str | None = None
    origin: str | None = None


class RunFolder:
    """Paths and small JSON files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.record = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.replay = path / "replay"
        self.model = path / "model"
        self.evaluation = path / "evaluation"
        self.result = self.evaluation / "length.json"  # `evaluation.result_files` loads more than this module

    def read_record(self) -> dict[str, Any]:
        """``run.json``, empty where there is none.

        Raises:
            UserError: the file is damaged.
        """
        if not self.record.exists():
            return {}
        if not self.record.is_file():
            raise UserError(f"run_dir={self.path}: {self.record.name} is no file")
        try:
            record = parse_json(self.record.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UserError(f"run_dir={self.path}: {self.record.name} cannot be read ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"run_dir={self.path}: {self.record.name} is not a run's record")
        return record

    def saved_states(self) -> tuple[Path, ...]:
        """The checkpoints that training can go on from, the newest first."""
        return tuple(path for name in (LAST, PREVIOUS) if (path := self.checkpoints / name).is_file())

    def has_trained(self) -> bool:
        """Whether a state to go on from was ever saved, even where none is left.

        A run that is killed before leaves rows of metrics, and perhaps the best state, which is saved first.
        """
        return self.read_record().get(HAS_SAVED) is True or (self.model / WEIGHTS_NAME).exists()

    def remove_partial_files(self) -> None:
        """Remove what a killed run was writing: each may be as large as a checkpoint."""
        for partial in self.path.rglob(".*.partial-*"):
            partial.unlink(missing_ok=True)

    def update_record(self, **values: Any) -> None:
        """Change some entries of ``run.json``."""
        write_atomically(self.record, json_bytes({**self.read_record(), **values}))

    def record_save(self) -> None:
        """Note, once, that there has been a state to go on from; a folder that is gone is not made anew."""
        record = self.read_record()
        if record.get(HAS_SAVED) is not True:
            write_atomically(self.record, json_bytes({**record, HAS_SAVED: True}), inside=self.path)

    def write_config(self, config: TrainConfig) -> None:
        """``config.json``: every setting."""
        write_atomically(self.config, json_bytes(asdict(config)))

    def contents(self) -> list[tuple[str, str]]:
        """Name and meaning of each entry that is there."""
        return [(name, meaning) for name, meaning in CONTENTS.items() if (self.path / name).exists()]


def status_of_run(path: Path) -> int:
    """Exit status of the run in a folder: 0 where it is finished, 75 where it can go on, otherwise 2."""
    status = RunFolder(path).read_record().get("status")
    return {"finished": 0, "stopped": 75}.get(str(status), USAGE_ERROR)


def find_start(config: TrainConfig, path: Path) -> Start:
    """Where the run begins.

    Args:
        config: settings of the new command.
        path: folder of the run.

    Raises:
        ConfigError: the folder holds another run, or a checkpoint does not fit the settings.
    """
    folder = RunFolder(path)
    others = _entries_but(WRITTEN_BEFORE_A_RUN, path)
    record = folder.read_record()
    if others and "status" not in record:
        raise _foreign_folder(path, others)
    _refuse_other_kinds(folder, record)
    if record and config.resume != "auto":
        raise ConfigError(
            f"run_dir={path}: already holds a run ({record.get('status', 'unknown')}); go on with it or "
            "choose another folder",
            key="resume",
            correction="resume=auto",
        )
    if config.resume not in (None, "auto"):
        assert config.resume is not None
        return Start(
            checkpoints=_foreign_checkpoints(config, Path(config.resume)),
            origin=str(Path(config.resume).absolute()),
        )
    if not record:
        return Start()
    begins = not folder.saved_states()
    if folder.config.exists() or not begins:
        _refuse_changes(config, folder)
    finished = record.get("status") == "finished" and record.get("budget") == _budget(config)
    if begins and folder.has_trained() and not (finished and folder.result.is_file()):
        raise _without_checkpoint(folder)
    if begins and not finished:  # killed before it saved anything
        origin = record.get("origin")
        return Start(
            checkpoints=() if origin is None else _foreign_checkpoints(config, Path(origin)),
            continues=True,
            wandb_id=record.get("wandb_id"),
            origin=origin,
        )
    return Start(
        checkpoints=folder.saved_states(),
        continues=True,
        finished=finished,
        wandb_id=record.get("wandb_id"),
    )


def check_run_folder(configs: Sequence[TrainConfig], path: Path, is_sweep: bool) -> None:
    """Refuse a folder that holds other runs, or something else.

    Args:
        configs: settings of the run, or of each run of a sweep.
        path: folder of the run; of a sweep the folder of its runs, which are numbered.
        is_sweep: whether it is a sweep.

    Raises:
        ConfigError: the folder cannot be used; see ``find_start``.
    """
    if not is_sweep:
        find_start(configs[0], path)
        return
    if others := _entries_but(WRITTEN_BESIDE_RUNS, path):
        raise _foreign_folder(path, others)
    held = sorted(path.glob("*/run.json"))
    if held and any(config.resume != "auto" for config in configs):
        raise ConfigError(
            f"run_dir={path}: already holds {len(held)} runs of a sweep; go on with them or choose "
            "another folder",
            key="resume",
            correction="resume=auto",
        )
    for number, config in enumerate(configs):
        find_start(config, path / str(number))


def _entries_but(known: re.Pattern[str], path: Path) -> list[str]:
    """Names in a folder that are not known, sorted; none where there is no folder.

    Raises:
        ConfigError: a file, or a folder that cannot be read.
    """
    try:
        return sorted(entry.name for entry in path.iterdir() if not known.fullmatch(entry.name))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise ConfigError(f"run_dir={path}: is or lies in a file; give a folder", key="run_dir") from None
    except OSError as error:
        raise ConfigError(f"run_dir={path}: cannot be read: {error.strerror}", key="run_dir") from None


def _foreign_folder(path: Path, entries: list[str]) -> ConfigError:
    what = "a run" if "run.json" in entries else f"{entries[0]!r} and is no run of windowlm"
    return ConfigError(
        f"run_dir={path}: holds {what}; give a new or empty folder, or null for one named by the time",
        key="run_dir",
        correction="run_dir=null",
    )


def _refuse_other_kinds(folder: RunFolder, record: dict[str, Any]) -> None:
    """Refuse what a run could not write, read or wait for, as a folder for a file or a pipe."""
    for names, kind, fits in ((FILES, "file", Path.is_file), (FOLDERS, "folder", Path.is_dir)):
        for name in names:
            if (folder.path / name).exists() and not fits(folder.path / name):
                raise ConfigError(
                    f"run_dir={folder.path}: its {name} is no {kind}; move it away, or give another run_dir",
                    key="run_dir",
                )
    for name, (pattern, allowed) in TEXTS.items():
        value = record.get(name)
        if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
            raise ConfigError(
                f"run_dir={folder.path}: {folder.record.name}: {name}={value!r} must be null or {allowed}; "
                "mend it, or give another run_dir",
                key="run_dir",
            )


def _without_checkpoint(folder: RunFolder) -> ConfigError:
    weights = folder.model / WEIGHTS_NAME
    instead = (
        f", model.init_from={folder.path} to start one from its last weights" if weights.is_file() else ""
    )
    return ConfigError(
        f"run_dir={folder.path}: the run in it was trained, and none of its checkpoints is left to go on "
        f"from ({LAST} or {PREVIOUS} in {folder.checkpoints}; checkpoint.keep=false removes them at the end "
        f"of a run). Put one back, give another run_dir for a new run{instead}, or remove the folder to "
        "train it again",
        key="run_dir",
    )


def _budget(config: TrainConfig) -> list[float | int | None]:
    return [config.trainer.max_steps, config.trainer.max_tokens, config.trainer.max_seconds]


def record_of(config: TrainConfig, status: Literal["running", "stopped", "finished"]) -> dict[str, Any]:
    """Entries of ``run.json`` that decide whether a run is finished."""
    return {"status": status, "budget": _budget(config)}


def _foreign_checkpoints(config: TrainConfig, source: Path) -> tuple[Path, ...]:
    folder = RunFolder(source)
    try:
        is_run = folder.saved_states() and folder.config.is_file()
    except OSError as error:
        raise ConfigError(f"resume={source}: cannot be read: {error.strerror}", key="resume") from None
    if not is_run:
        raise ConfigError(
            f"resume={source}: holds no run with a checkpoint; give a run's folder, auto or null",
            key="resume",
        )
    for key, given, before in _changes(config, folder):
        if key.startswith(SHARED_WITH_ORIGIN):
            raise ConfigError(
                f"{key}={given}: the run in {source} has {key}={before}, and its state fits no other",
                key=key,
                correction=f"{key}={before}",
            )
    return folder.saved_states()


def lasting_settings(config: TrainConfig) -> dict[str, Any]:
    """By key, those that a resumed run may not change: they decide what is learnt from what."""
    return {key: value for key, value in _settings(config).items() if not is_changeable(key)}


def _settings(config: TrainConfig) -> dict[str, Any]:
    """All of them by key, as JSON says them."""
    return flattened(json.loads(json.dumps(asdict(config))))


def _refuse_changes(config: TrainConfig, folder: RunFolder) -> None:
    """Refuse settings that differ from those of the run in ``folder``, but for the changeable ones."""
    for key, given, before in _changes(config, folder):
        if not is_changeable(key):
            raise ConfigError(
                f"{key}={given}: the run in {folder.path} has {key}={before}; what may change when it goes "
                f"on is {', '.join(CHANGEABLE)}",
                key=key,
                correction=f"{key}={before}",
            )


def _changes(config: TrainConfig, folder: RunFolder) -> Iterator[tuple[str, str, str]]:
    """Each setting that differs from that of the run in ``folder``, as text: key, new value, old value."""
    old, new = _settings_kept(folder), _settings(config)
    if new[ROWS] is None:  # whatever that run has
        new[ROWS] = old.get(ROWS)
    return changed_settings(old, new)


def _settings_kept(folder: RunFolder) -> dict[str, Any]:
    """Of the run in a folder, by key."""
    try:
        settings = parse_json(folder.config.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no object")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{folder.config}: cannot be read ({error}); choose another run_dir") from None
    return flattened(settings)


def batch_size_kept(config: TrainConfig, path: Path) -> int | None:
    """Sequences a batch of the run whose state the new command goes on from; None where there is none.

    Args:
        config: settings of the new command.
        path: folder of its run.

    Raises:
        ConfigError: the settings of that run cannot be read.
    """
    folder = RunFolder(path if config.resume in (None, "auto") else Path(config.resume))
    if not folder.config.is_file():
        # Killed before it had written its settings, a run may have begun from another's state.
        origin = folder.read_record().get("origin")
        if origin is None:
            return None
        folder = RunFolder(Path(origin))
    rows = _settings_kept(folder).get(ROWS)
    if type(rows) is not int or rows < 1:
        raise ConfigError(f"{folder.config}: {ROWS}={rows} is no number of rows; choose another run_dir")
    return rows


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each setting that differs, as text: key, new value, old value."""
    known = settings_of(TrainConfig)
    for key in sorted(old.keys() | new.keys()):
        # A setting that came after that run: the run was as its default is.
        if key not in old and key in known and known[key].default == new[key]:
            continue
        if old.get(key) != new.get(key):
            yield key, setting_text(new.get(key)), setting_text(old.get(key))


def is_changeable(key: str) -> bool:
    """Whether a setting may change when a run goes on."""
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)
