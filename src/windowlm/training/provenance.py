"""Where a run came from: git state, versions, machine."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = ("windowlm", "torch", "lightning", "tokenizers", "datasets", "numpy")


def provenance() -> dict[str, Any]:
    """Commit and whether files differ from it (None outside a repository), and versions."""
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": (_git("status", "--porcelain") or "").splitlines(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": {name: version(name) for name in RECORDED_PACKAGES},
    }


def code_difference() -> bytes:
    """What ``git diff`` says of the project's code; nothing where it is as committed, or in no repository."""
    return (_git("diff", "--no-color", "HEAD", "--", ":/src", ":/conf", ":/train.py") or "").encode()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip()
