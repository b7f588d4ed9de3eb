import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import PROJECT
from tests.interchange.models import random_decoder, save_run
from windowlm.model.config import ModelConfig
from windowlm.model.cost import model_cost
from windowlm.tokenization.config import TokenizerConfig

README = (PROJECT / "README.md").read_text(encoding="utf-8")
SOURCE = PROJECT / "src" / "windowlm"


def listed() -> dict[str, str]:
    return dict(re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", README, flags=re.MULTILINE))


def test_the_file_map_lists_every_file_and_no_other() -> None:
    files = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py")}
    packages = {name for name in files if name.endswith("/__init__.py")}
    scripts = {str(path.relative_to(PROJECT)) for path in (PROJECT / "scripts").glob("*.py")}
    assert set(listed()) == (files - packages) | scripts | {"train.py"}


def test_the_file_map_says_what_the_files_say() -> None:
    for name, line in listed().items():
        path = SOURCE / name if (SOURCE / name).exists() else PROJECT / name
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        assert " ".join(first.split()).rstrip(".") == line


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (PROJECT / target).exists(), target


def test_the_readme_counts_the_parameters_of_the_models() -> None:
    row = re.search(r"`tiny`, `small`, `base`: ([\d.]+), ([\d.]+) and ([\d.]+) million parameters", README)
    assert row is not None
    for name, written in zip(("tiny", "small", "base"), row.groups(), strict=True):
        settings = yaml.safe_load((PROJECT / f"conf/model/{name}.yaml").read_text(encoding="utf-8"))
        del settings["rotary"]
        cost = model_cost(ModelConfig(**settings), TokenizerConfig().vocabulary_size, 1024, 4)
        assert f"{cost.parameters / 1e6:.1f}" == written


def test_the_lines_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "runs/sweep/0", random_decoder())
    monkeypatch.chdir(tmp_path)
    section = README[README.index("## In Python") :]
    text_of, layers = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(text_of, names)
    assert capsys.readouterr().out
    checked, claims = re.subn(
        r"^(\w.*)  # (?:logits )?(\[.*\])$", r"assert [*(\1).shape] == \2", layers, flags=re.MULTILINE
    )
    assert claims == 2
    exec(checked, {**names, "T": len("def window("), "vocabulary": 256})


def test_continuous_integration_finds_the_test_command() -> None:
    script = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    find = re.search(r"^test_command=\$\((.+)\)$", script, flags=re.MULTILINE)
    assert find is not None
    found = subprocess.run(["bash", "-c", find[1]], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith('pip install -e ".[dev]" && .venv/bin/python -m pytest')
