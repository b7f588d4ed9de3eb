"""The option `--out` of scripts that write a report: where it can be written is known before the work."""

import argparse
from pathlib import Path

from windowlm.atomic_write import obstacle


def out_folder(text: str) -> Path:
    """A folder that is there and can be written, or can be made."""
    folder = Path(text)
    if (reason := obstacle(folder)) is not None:
        raise argparse.ArgumentTypeError(f"{text}: {reason}; give a folder that can be written")
    return folder


def out_file(text: str) -> Path:
    """A file in such a folder."""
    file = Path(text)
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: it is a folder; give a file")
    return out_folder(str(file.parent)) / file.name
