"""Files that a user can be handed run no code and reach no other folder; keys stay where they are."""

import ast
import copy
import io
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.bad_inputs import Runs, saved, signed
from tests.conftest import PROJECT
from tests.training.runs import begin
from windowlm.bundle import load
from windowlm.config import ConfigError
from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError
from windowlm.data.sources import find_source
from windowlm.errors import UserError
from windowlm.tokenization.tokenizer import Tokenizer
from windowlm.training.checkpoint_io import AtomicCheckpointIO, DamagedCheckpointError

SOURCES = [
    *(PROJECT / "src").rglob("*.py"),
    *(PROJECT / "scripts").glob("*.py"),
    PROJECT / "train.py",
]
# What runs what a file says, or unpacks one into a folder, by its full name or that of its module.
UNSAFE = {
    "builtins.eval",
    "builtins.exec",
    "cloudpickle",
    "dill",
    "hydra.utils",
    "joblib",
    "marshal",
    "os.popen",
    "os.system",
    "pandas.read_pickle",
    "pickle",
    "pty",
    "shelve",
    "shutil.unpack_archive",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "tarfile.TarFile",
    "tarfile.open",
    "torch.hub",
    "torch.jit.load",
    "torch.package",
    "torch.serialization",
    "torch.utils.model_zoo",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "zipfile.PyZipFile",
}
UNPACKING = ("extract", "extractall")  # of an archive, whose headers may be read
# Safe where they are called with this; what is None must not be given at all, or be False.
SAFE_CALLS = {"torch.load": "weights_only", "numpy.load": None}
# All names of which would be those of a file, and could not be told from its own.
MODULES = {name.rpartition(".")[0] for name in (*UNSAFE, *SAFE_CALLS) if "." in name}
FALSE_EVERYWHERE = ("trust_remote_code", "shell", "allow_pickle")
KEY = "0123456789abcdef" * 2 + "01234567"


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree: ast.AST) -> dict[str, str]:
    """Full name of what each name of a file stands for, by its imports."""
    names = {"eval": "builtins.eval", "exec": "builtins.exec", "__import__": "builtins.__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                names |= {alias.asname: alias.name} if alias.asname else {first: first}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.AST, names: dict[str, str]) -> str | None:
    """The full name of what an expression stands for; None where it is none of an import."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    owner = attribute = None
    if isinstance(node, ast.Attribute):
        owner, attribute = node.value, node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        said = node.args[1]
        owner, attribute = node.args[0], said.value if isinstance(said, ast.Constant) else None
    found = None if owner is None else full_name(owner, names)
    return None if found is None or attribute is None else f"{found}.{attribute}"


def is_safe_call(call: ast.Call, name: str) -> bool:
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    needed = SAFE_CALLS[name]
    return keywords.get(needed) == "True" if needed else len(call.args) == 1 and None not in keywords


def mistakes(source: str) -> list[str]:
    """Uses of what is not safe, whatever a file calls it and whether it calls it at once."""
    tree = ast.parse(source)
    names = imported(tree)
    safe, found = set(), []
    for call in calls(tree):
        for keyword in call.keywords:
            if keyword.arg in FALSE_EVERYWHERE and ast.unparse(keyword.value) != "False":
                found.append(f"{call.lineno}: {keyword.arg}")
        name = full_name(call.func, names)
        if name in SAFE_CALLS and is_safe_call(call, name):
            safe.add(call.func)
    for node in ast.walk(tree):
        used = [full_name(node, names)]
        if isinstance(node, ast.Attribute) and node.attr in UNPACKING:
            found.append(f"{node.lineno}: {node.attr}")
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            used = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [f"{node.lineno}: {name}" for name in used if name in [f"{one}.*" for one in MODULES]]
        for name in used:
            if name is None or node in safe:
                continue
            parts = name.split(".")
            above = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            alone = name in SAFE_CALLS and not isinstance(node, ast.ImportFrom)
            if above & UNSAFE or alone:
                found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_calls_what_would_run_the_content_of_another(path: Path) -> None:
    assert mistakes(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch as t; t.load(path)",
        "import torch; getattr(torch, 'load')(path)",
        "import torch; read = torch.load",
        "from torch import load; load(path)",
        "from torch import load as read; read(path, weights_only=safe)",
        "from torch import *; load(path)",
        "import torch.serialization; torch.serialization.load(path)",
        "from torch.serialization import load",
        "from torch import hub",
        "import pickle; pickle.Unpickler(file).load()",
        "import pickle as safe; safe.loads(data)",
        "from pickle import Unpickler",
        "from pickle import loads as parse; parse(data)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import numpy as np; np.load(path, None, True)",
        "import numpy as np; np.load(path, **options)",
        "from numpy import load; load(path, allow_pickle=True)",
        "import numpy; numpy.lib.format.read_array(file, allow_pickle=True)",
        "from pandas import read_pickle",
        "import yaml; yaml.load(text, yaml.Loader)",
        "from hydra.utils import instantiate; instantiate(config)",
        "from os import system",
        "import zipfile; zipfile.ZipFile(path).extractall()",
        "with ZipFile(path) as archive: archive.extract(name)",
        "from shutil import unpack_archive as copy",
        "run = eval; run(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=asked)",
    ],
)
def test_what_would_run_the_content_of_a_file_is_found_under_each_name(source: str) -> None:
    assert mistakes(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(path, weights_only=True)",
        "from torch import load; load(path, map_location='cpu', weights_only=True)",
        "import numpy as np; np.load(path); np.load(path, allow_pickle=False)",
        "import yaml; yaml.safe_load(text)",
        "model.eval(); own.load(path); load(path)",
        "import zipfile; zipfile.ZipFile(path).infolist()",
    ],
)
def test_what_is_safe_is_not_found(source: str) -> None:
    assert not mistakes(source)


def test_every_model_of_transformers_is_opened_without_code_of_its_folder() -> None:
    opened = [
        (path, call)
        for path in SOURCES
        for call in calls(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
    ]
    assert len(opened) >= 3
    for path, call in opened:
        # Where nothing is said, transformers asks on a terminal whether to run it.
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code") == "False", f"{path}:{call.lineno}"


def test_what_is_imported_by_name_is_a_constant_of_the_code() -> None:
    # The lazy exports of the two packages, of a table in the same file, and the peers of a benchmark.
    allowed = {"windowlm/__init__.py", "attention/__init__.py", "scripts/attention_peers.py"}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = imported(tree)
        used = {full_name(node, names) for node in ast.walk(tree)}
        if used & {"importlib.import_module", "builtins.__import__"}:
            assert str(Path(*path.parts[-2:])) in allowed, path


def test_no_setting_names_something_to_instantiate_or_import() -> None:
    for path in (PROJECT / "conf").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"_target_|_partial_|!!python|trust_remote_code: *true", text), path


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Runs()),
        signed(pickle.dumps(Runs())),
        saved(Runs()),
        signed(saved(Runs())),
        signed(saved({"state_dict": {"weight": Runs()}})),
        signed(saved({"callbacks": [Runs()]})),
    ],
)
def test_a_checkpoint_runs_nothing(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("last.ckpt").write_bytes(content)
    with pytest.raises(UserError):
        AtomicCheckpointIO().load_checkpoint(Path("last.ckpt"))
    assert os.listdir() == ["last.ckpt"]
    # The example is one: read as others read it, it runs.
    Path("file").write_bytes(saved(Runs()))
    torch.load("file", weights_only=False)
    assert Path("pwned").exists()


def packed(state: Any) -> bytes:
    """A state whose records are compressed, which torch reads as any other."""
    content = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved(state))) as whole,
        zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    return content.getvalue()


def overlapping(state: Any) -> bytes:
    """A state in whose list of records the weights stand many times."""
    content = io.BytesIO(saved(state))
    with zipfile.ZipFile(content, "a") as archive:
        weights = archive.getinfo("archive/data/0")
        for number in range(1, 100):
            archive.filelist.append(copy.copy(weights))
            archive.filelist[-1].filename = f"archive/data/{number}"
        archive.writestr("archive/another", b"")  # so that the list is written anew
    return content.getvalue()


@pytest.mark.parametrize(
    ("altered", "message"),
    [
        (packed, "its records are compressed, which could fill the memory"),
        (overlapping, r"its records state 104,[\d,]+ bytes and it has 1,[\d,]+, "),
        (lambda _: b"text" + saved({}), "it is no zip archive"),
    ],
)
def test_a_checkpoint_that_expands_is_refused_before_torch_reads_it(
    altered: Callable[[Any], bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, state = tmp_path / "last.ckpt", {"weights": torch.zeros(1 << 18)}
    path.write_bytes(signed(altered(state)))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch reads it"))
    with pytest.raises(DamagedCheckpointError, match=rf"last\.ckpt: not a readable checkpoint \({message}"):
        AtomicCheckpointIO().load_checkpoint(path)
    monkeypatch.undo()
    if altered is packed:  # The example is one.
        assert path.stat().st_size < 10_000
        assert torch.equal(torch.load(path, weights_only=True)["weights"], state["weights"])


KINDS = ("Image", "Audio", "Video", "Pdf", "Nifti", "Mesh", "no kind")


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/secret", "missing.png"])
def test_no_cell_of_parquet_leads_to_an_address_or_another_file(name: str, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(3)]
    cells = [{"bytes": None, "path": name}] * 3
    for kind in KINDS:
        features = {"text": {"dtype": "string", "_type": "Value"}, "title": {"_type": kind}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table({"text": texts, "title": cells}).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / "a.parquet")
        source = find_source(DataConfig(name="text", path=str(tmp_path / "a.parquet")))
        assert ["".join(document.read()) for document in source.documents()] == texts


@pytest.fixture
def run(documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(documents, "texts")
    assert begin(Path("run"), Path("texts"), Path("cache"), trainer={"max_steps": 1}) == 0
    return Path("run")


def test_a_model_of_malicious_files_runs_nothing(run: Path) -> None:
    whole = {path: path.read_bytes() for path in (run / "model").iterdir()}
    for path, content in whole.items():
        for bad in (pickle.dumps(Runs()), saved(Runs())):
            path.write_bytes(bad)
            with pytest.raises(UserError):
                load(run)
        path.write_bytes(content)
    config = run / "model" / "config.json"
    for key in ("_target_", "auto_map", "trust_remote_code"):
        values = json.loads(whole[config])
        values["model"][key] = "os.system"
        config.write_text(json.dumps(values))
        with pytest.raises(UserError, match=re.escape(key)):
            load(run)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("kind", ["../../outside", "/etc/passwd", "os.system", "bpe"])
def test_a_description_leads_to_no_other_file(kind: str, tmp_path: Path) -> None:
    for description in ({"kind": kind}, {"kind": "bpe", "end_mark": "x", "file": kind}):
        (tmp_path / "tokenizer_description.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match=r"tokenizer|file"):
            Tokenizer.load(tmp_path)


def test_keys_and_tokens_reach_no_file_no_screen_and_no_error(
    documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(documents, "texts")
    settings: dict[str, Any] = {"logger": {"kind": "wandb"}, "trainer": {"max_steps": 1}}
    assert begin(Path("run"), Path("texts"), Path("cache"), **settings) == 0
    with pytest.raises(UserError) as refused:
        begin(Path("run"), Path("texts"), Path("cache"), resume=None, **settings)
    screen = capfd.readouterr()
    assert KEY not in screen.out + screen.err + str(refused.value)
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("kind", [UserError, DataError, ConfigError])
def test_an_address_that_an_error_quotes_is_told_without_its_password(kind: type[UserError]) -> None:
    error = kind(f"data: Server error for url 'http://name:{KEY}@host:80/a?b=c@d' and s3://{KEY}@bucket/x")
    assert str(error) == "data: Server error for url 'http://host:80/a?b=c@d' and s3://bucket/x"
