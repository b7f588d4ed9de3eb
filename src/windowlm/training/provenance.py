"""Where a run came from: git state, versions, machine."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CODE = (":/src", ":/conf", ":/train.py", ":/scripts")
OF_CODE = (".py", ".yaml")  # of new files: no others, which may hold anything
# Whatever the user's own git is set to show.
GIT = ("git", "-c", "core.quotepath=true", "-c", "diff.relative=false")
AS_A_PATCH = (
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--binary",
    "--src-prefix=a/",
    "--dst-prefix=b/",
)
QUIET: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "timeout": 10}
RECORDED_PACKAGES = (
    "windowlm",
    "torch",
    "lightning",
    "hydra-core",
    "safetensors",
    "tokenizers",
    "datasets",
    "numpy",
)
PACKAGES_OF_KERNELS = ("triton", "flash-attn-4", "torchao")  # which need not be installed
DRIVER = Path("/sys/module/nvidia/version")


def provenance() -> dict[str, Any]:
    """Commit and whether files differ from it (None outside of a clone of the project), and versions."""
    commit = changed = None
    if _is_clone():
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {
        "git_commit": None if commit is None else commit.decode().strip(),
        "git_changed_files": (changed or b"").decode(errors="replace").splitlines(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": versions(),
    }


def versions() -> dict[str, str | int | None]:
    """Versions of packages, and where torch is built for CUDA of that, of cuDNN and of the driver.

    None stands for what is not there.
    """
    found: dict[str, str | int | None] = {name: version(name) for name in RECORDED_PACKAGES}
    for name in PACKAGES_OF_KERNELS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    # A command that has not loaded torch computes nothing by it, and need not wait for it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        driver = DRIVER.read_text(encoding="utf-8").strip() if DRIVER.is_file() else None
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver}
    return found


def code_difference() -> bytes:
    """What `git apply` takes to make the project's code of its commit what it is, new files included.

    Nothing where it is as committed, and outside of a clone.
    """
    if not _is_clone():
        return b""
    parts = [_git("diff", *AS_A_PATCH, "HEAD", "--", *CODE) or b""]
    new = _git("ls-files", "-z", "--full-name", "--others", "--exclude-standard", "--", *CODE) or b""
    names = [name for name in map(os.fsdecode, sorted(new.split(b"\0"))) if name.endswith(OF_CODE)]
    if names:
        # The name in the patch is the one that is given.
        top = os.fsdecode((_git("rev-parse", "--show-toplevel") or b".").rstrip(b"\n"))
        for name in names:
            # With two files the status says whether they differ.
            compared = ("--no-index", "--", "/dev/null", name)
            parts.append(_git("diff", *AS_A_PATCH, *compared, folder=top, most=1) or b"")
    return b"".join(parts)


def _is_clone() -> bool:
    """Whether git tracks this file: an installed package may lie within a repository of something else."""
    return _git("ls-files", "--error-unmatch", "--", os.path.abspath(__file__)) is not None


def _git(*arguments: str, folder: str | None = None, most: int = 0) -> bytes | None:
    """What git says in a folder, that of this file by default; None where its status is above ``most``."""
    try:
        done = subprocess.run([*GIT, *arguments], cwd=folder or Path(__file__).parent, check=False, **QUIET)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode <= most else None
