"""The folder that a checkpoint names: a run's, a model's in our layout or transformers', or one of the hub.

Loading this module loads no torch.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from windowlm.errors import UserError
from windowlm.json_text import parse_json
from windowlm.model.config import ModelConfig

IN_RUN = "model"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# Nothing that would have to be run, such as pickles, and no second format of the weights.
HUB_FILES, NOT_OF_THE_HUB = ["*.json", "*.safetensors"], ["*/*", "consolidated*"]
HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model.

    Attributes:
        path: the folder.
        config: content of its config.json.
    """

    path: Path
    config: dict[str, Any]

    @property
    def foreign(self) -> bool:
        """Whether it is in transformers' layout."""
        return "model_type" in self.config


def find_model_folder(checkpoint: str | Path, key: str = "checkpoint") -> ModelFolder:
    """The folder of a checkpoint; a name of the hub is downloaded where there is no such folder here.

    Args:
        checkpoint: a run's folder, a model's, or ``owner/name``.
        key: the setting that names it.

    Raises:
        UserError: there is no such folder and no such model, or its config.json is missing or damaged.
    """
    try:
        return _find_model_folder(checkpoint, key)
    except OSError as error:  # as of a folder that may not be entered
        raise UserError(f"{key}={checkpoint}: cannot be read: {error.strerror}: {error.filename}") from None


def _find_model_folder(checkpoint: str | Path, key: str) -> ModelFolder:
    path = Path(checkpoint)
    if not str(checkpoint).strip():
        raise UserError(
            f"{key}={checkpoint}: it is empty; give the folder of a run or a model, or a hub name"
        )
    if not path.is_dir():
        path = _downloaded(f"{key}={checkpoint}", str(checkpoint))
    # The config.json of a run itself is that of the training.
    is_model = (path / WEIGHTS_NAME).is_file() or "model_type" in _config(path / CONFIG_NAME, lenient=True)
    folder = path if is_model else path / IN_RUN
    if not folder.is_dir() and (path / CONFIG_NAME).is_file():
        _config(path / CONFIG_NAME, lenient=False)  # which says what is wrong with it
    config = _config(folder / CONFIG_NAME, lenient=True)
    for name in (CONFIG_NAME, *([] if "model_type" in config else [WEIGHTS_NAME])):
        if not (folder / name).is_file():
            raise UserError(
                f"{key}={checkpoint}: {folder / name} is missing; give the folder of a run that has ended, "
                "its model folder, or one in transformers' layout"
            )
    return ModelFolder(folder, _config(folder / CONFIG_NAME, lenient=False))


def own_shape(folder: ModelFolder) -> ModelConfig:
    """Shape of the model in a folder of our layout.

    Raises:
        UserError: its config.json says none.
    """
    try:
        return TypeAdapter(ModelConfig).validate_json(json.dumps(folder.config.get("model")), strict=True)
    except ValidationError as error:
        # Of a setting that may be of several kinds each kind has its complaint.
        setting = error.errors()[0]["loc"][:1]
        said = dict.fromkeys(entry["msg"] for entry in error.errors() if entry["loc"][:1] == setting)
        key = ".".join(map(str, ("model", *setting)))
        raise UserError(f"{folder.path / CONFIG_NAME}: {key}: {'; or '.join(said)}") from None


def _config(path: Path, *, lenient: bool) -> dict[str, Any]:
    """Its content; leniently empty where it cannot be read or holds something else than an object."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        if lenient:
            return {}
        raise UserError(f"{path}: not JSON: {error}") from None
    if isinstance(content, dict):
        return content
    if lenient:
        return {}
    raise UserError(f"{path}: holds a {type(content).__name__} and not an object of JSON")


def _downloaded(given: str, name: str) -> Path:
    missing = f"{given}: there is no such folder"
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{missing}; give a run's folder or its model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=NOT_OF_THE_HUB))
    except Exception as error:  # of the hub, its network and its file locks
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{missing}, and the hub gives no model of that name ({type(error).__name__}: {reason}); give a "
            "folder, or try again with a network"
        ) from None
