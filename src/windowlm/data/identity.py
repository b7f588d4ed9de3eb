"""Names for content: what is found under a name is certainly what it says."""

import hashlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType


def hash_of(*parts: object) -> str:
    """128 bits, in hexadecimal, of values that print alike exactly when they are alike."""
    return hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()[:32]


def code_version(*modules: ModuleType) -> str:
    """Hash of the modules' source code, so that what other code made is not taken for this code's."""
    return hash_of(*(inspect.getsource(module) for module in modules))


def packages_version(*names: str) -> str:
    """The same of modules, and of all modules in packages, of the project."""
    project = Path(__file__).parents[1]
    files = [
        file
        for name in names
        for file in [project / f"{name}.py", *sorted((project / name).rglob("*.py"))]
        if file.is_file()
    ]
    return hash_of(*(file.read_text(encoding="utf-8") for file in files))


def file_states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of each file: a change shows at once, where hashing the content takes long.

    A file that is changed without a change of size and time is not noticed.
    """
    states = ((file.resolve(), file.stat()) for file in files)
    return [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]
