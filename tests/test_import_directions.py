"""Imports go one way, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "windowlm"

# What each package may import of the project besides itself. Every package but attention may import `SHARED`
# as well; a package's config module may be imported by the composed configuration.
ALLOWED = {
    "attention": set(),
    "model": {"attention"},
    "parallel": {"attention"},
    "tokenization": set(),
    "data": {"tokenization"},
    "interchange": {"attention", "model", "tokenization"},
    "model_folder": {"model"},
    "bundle": {"interchange", "model", "model_folder", "tokenization"},
    "export_run": {"bundle", "evaluation", "interchange", "model_folder"},
    "generation": {"attention", "bundle", "model", "tokenization"},
    "evaluation": {"bundle", "data", "interchange", "model", "model_folder", "parallel", "tokenization"},
    "study": {"bundle", "data", "evaluation", "interchange", "model", "model_folder", "tokenization"},
    "training": {
        "attention",
        "bundle",
        "command_line",
        "config",
        "data",
        "evaluation",
        "interchange",
        "model",
        "model_folder",
        "parallel",
        "tokenization",
    },
    "config": {
        "attention",
        "data",
        "evaluation",
        "generation",
        "model",
        "parallel",
        "study",
        "tokenization",
        "training",
    },
    "command_line": {"command_words", "config", "hydra_settings", "parallel", "unbegun_runs"},
    "command_words": {"config"},
    "hydra_settings": {"command_words", "config"},
    "unbegun_runs": set(),
    "errors": set(),
    "atomic_write": set(),
    "setting_text": set(),
    "json_text": set(),
    "deferred_numbers": set(),
    "__init__": {"attention", "bundle", "generation"},
}
SHARED = {"errors", "atomic_write", "setting_text", "json_text", "deferred_numbers"}
ONLY_IMPORTER = {"wandb": "training/wandb_run.py", "hydra": "command_line.py", "omegaconf": "command_line.py"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """The module's full name, where dots count from the package of the importing file."""
    if node.level == 0:
        assert node.module is not None
        return node.module
    package = ["windowlm", *path.relative_to(SOURCE).parts[:-1]]
    above = package[: len(package) - (node.level - 1)]
    assert above, f"{path} climbs out of the project"
    return ".".join([*above, *([node.module] if node.module else [])])


def owner(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_what_its_package_may(path: Path) -> None:
    own = owner(path)
    allowed = ALLOWED[own] | {own} | (SHARED if own != "attention" else set())
    imported = {name.split(".")[1] for name in imports_of(path) if name.startswith("windowlm.")}
    assert imported <= allowed, f"{path.name} imports {sorted(imported - allowed)}"


def test_relative_imports_count_under_their_full_names() -> None:
    tree = ast.parse("from ..model import decoder\nfrom . import window\nfrom .backends import band")
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [absolute(SOURCE / "attention" / "picture.py", node) for node in nodes]
    assert names == ["windowlm.model", "windowlm.attention", "windowlm.attention.backends"]


@pytest.mark.parametrize("library", ONLY_IMPORTER)
def test_a_library_at_the_border_is_imported_by_one_file(library: str) -> None:
    importers = {
        str(path.relative_to(SOURCE))
        for path in FILES
        if any(name.split(".")[0] == library for name in imports_of(path))
    }
    assert importers == {ONLY_IMPORTER[library]}


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "config.py"], ids=owner)
def test_settings_load_no_heavy_library(path: Path) -> None:
    heavy = {"torch", "numpy", "lightning", "datasets", "tokenizers", "wandb"}
    assert not heavy & {name.split(".")[0] for name in imports_of(path)}
