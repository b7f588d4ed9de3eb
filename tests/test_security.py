"""Files that a user can be handed run no code and reach no other folder; keys stay where they are."""

import ast
import json
import os
import pickle
import re
import shutil
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
from windowlm.training.checkpoint_io import AtomicCheckpointIO

SOURCES = [
    *(PROJECT / "src").rglob("*.py"),
    *(PROJECT / "scripts").glob("*.py"),
    PROJECT / "train.py",
]
# Calls that run what a file says, with the keyword that would make them safe.
UNSAFE_CALLS = {
    "pickle.load": None,
    "pickle.loads": None,
    "joblib.load": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "eval": None,
    "exec": None,
    "torch.load": "weights_only",
    "hydra.utils.instantiate": None,
    "instantiate": None,
    "tarfile.open": None,
    "zipfile.ZipFile": None,
    "shutil.unpack_archive": None,
    "os.system": None,
}
KEY = "0123456789abcdef" * 2 + "01234567"


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_file_calls_what_would_run_the_content_of_another(path: Path) -> None:
    for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        name = ast.unparse(call.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code", "False") == "False", f"{path}:{call.lineno}"
        assert keywords.get("shell", "False") == "False", f"{path}:{call.lineno}"
        if name in UNSAFE_CALLS:
            safe = UNSAFE_CALLS[name]
            assert safe is not None, f"{path}:{call.lineno}: {name}"
            assert keywords.get(safe) == "True", f"{path}:{call.lineno}: {name}"


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
        for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            if ast.unparse(call.func) in ("import_module", "importlib.import_module", "__import__"):
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
