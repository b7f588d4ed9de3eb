"""The option `--out` of scripts that write a report: where it can be written is known before the work."""

import argparse
import os
from pathlib import Path


def out_folder(text: str) -> Path:
    """A folder that is there and can be written, or can be made."""
    folder = Path(text)
    try:
        nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: {nearest} is no folder that can be written")
    return folder


def out_file(text: str) -> Path:
    """A file in such a folder."""
    file = Path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: it is a folder; give a file")
    return out_folder(str(file.parent)) / file.name
