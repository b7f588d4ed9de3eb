"""The folder that a checkpoint names: a run's, a model's in our layout or transformers', or one of the hub.

Loading this module loads no torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windowlm.errors import UserError
from windowlm.json_text import parse_json

IN_RUN = "model"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# Nothing that would have to be run, such as pickles, and no second format of the weights.
HUB_FILES = ["*.json", "*.safetensors"]
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


def find_model_folder(checkpoint: str | Path) -> ModelFolder:
    """The folder of a checkpoint; a name of the hub is downloaded where there is no such folder here.

    Args:
        checkpoint: a run's folder, a model's, or ``owner/name``.

    Raises:
        UserError: there is no such folder and no such model, or its config.json is missing or damaged.
    """
    path = Path(checkpoint)
    if not path.is_dir():
        path = _downloaded(str(checkpoint))
    # The config.json of a run itself is that of the training.
    is_model = (path / WEIGHTS_NAME).is_file() or "model_type" in _config(path / CONFIG_NAME, lenient=True)
    folder = path if is_model else path / IN_RUN
    found = ModelFolder(folder, _config(folder / CONFIG_NAME, lenient=False))
    if not found.foreign and not (folder / WEIGHTS_NAME).is_file():
        raise _missing(folder / WEIGHTS_NAME)
    return found


def _config(path: Path, *, lenient: bool) -> dict[str, Any]:
    """Its content; empty where it holds something else than an object, or cannot be read leniently."""
    if not path.is_file():
        if lenient:
            return {}
        raise _missing(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        if lenient:
            return {}
        raise UserError(f"{path}: not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _missing(path: Path) -> UserError:
    return UserError(
        f"checkpoint={path.parent}: {path} is missing; give the folder of a run that has ended, its model "
        "folder, or one in transformers' layout"
    )


def _downloaded(name: str) -> Path:
    missing = f"checkpoint={name}: there is no such folder"
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{missing}; give a run's folder or its model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of the hub, its network and its file locks
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{missing}, and the hub gives no model of that name ({type(error).__name__}: {reason}); give a "
            "folder, or try again with a network"
        ) from None
