"""What a run tells of its code."""

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from windowlm.training import provenance as module
from windowlm.training.provenance import RECORDED_PACKAGES, code_difference, provenance, versions

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that tracks the file that asks, and one whose last lines are blank."""
    folder = tmp_path / "clone"
    own = folder / "src" / "windowlm" / "training" / "provenance.py"
    own.parent.mkdir(parents=True)
    own.write_text("first\n\n\n")
    git(folder, "init", "-q")
    git(folder, "config", "diff.noprefix", "true")
    git(folder, "config", "color.diff", "always")
    git(folder, "config", "diff.relative", "true")
    (folder / "train.py").write_text("above the file that asks\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    monkeypatch.setattr(module, "__file__", str(own))
    return folder


def test_the_difference_makes_the_committed_code_what_it_was(clone: Path, tmp_path: Path) -> None:
    assert code_difference() == b""
    own = clone / "src" / "windowlm" / "training" / "provenance.py"
    own.write_text("changed\n\n\n")
    (clone / "train.py").write_text("changed\n")
    (own.parent / "größe.py").write_bytes(b"caf\xe9 = 1")
    (own.parent / "empty.py").touch()
    (own.parent / "key.txt").write_text("secret")
    (clone / "notes.py").write_text("not of the project's code")
    (tmp_path / "changes.diff").write_bytes(code_difference())
    git(tmp_path, "clone", "-q", str(clone), "other")
    git(tmp_path / "other", "apply", str(tmp_path / "changes.diff"))
    there = tmp_path / "other" / "src" / "windowlm" / "training"
    assert (tmp_path / "other" / "train.py").read_bytes() == b"changed\n"
    for name in ("provenance.py", "größe.py", "empty.py"):
        assert (there / name).read_bytes() == (own.parent / name).read_bytes()
    assert sorted(path.name for path in there.iterdir()) == ["empty.py", "größe.py", "provenance.py"]


def test_a_clone_says_its_commit_and_changed_files(clone: Path) -> None:
    (clone / "new.txt").touch()
    said = provenance()
    assert said["git_commit"] == git(clone, "rev-parse", "HEAD").strip()
    assert said["git_changed_files"] == ["?? new.txt"]


def test_the_repository_of_something_else_is_not_told_of(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = clone / "environment" / "windowlm" / "training" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    (clone / "src" / "theirs.py").write_text("password = 1")
    monkeypatch.setattr(module, "__file__", str(installed))
    assert provenance()["git_commit"] is None
    assert provenance()["git_changed_files"] == []
    assert code_difference() == b""


def test_the_packages_that_decide_numbers_are_told_and_which_of_them_are_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def installed(name: str) -> str:
        if name not in (*RECORDED_PACKAGES, "triton"):
            raise PackageNotFoundError(name)
        return f"1 of {name}"

    assert versions()["hydra-core"] == version("hydra-core")
    monkeypatch.setattr(module, "version", installed)
    monkeypatch.setattr(torch.version, "cuda", None)
    there = {name: f"1 of {name}" for name in (*RECORDED_PACKAGES, "triton")}
    assert versions() == {**there, "flash-attn-4": None, "torchao": None}


def test_a_build_for_cuda_tells_its_versions_and_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(module, "DRIVER", tmp_path / "version")
    said = versions()
    assert [said[name] for name in ("cuda", "cudnn", "driver")] == ["12.8", 91002, None]
    (tmp_path / "version").write_text("570.86.15\n")
    assert versions()["driver"] == "570.86.15"
