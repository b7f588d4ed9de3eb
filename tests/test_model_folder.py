"""Where a checkpoint's model lies: run, model folder, transformers' layout, hub."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from tests.interchange.models import random_decoder, save_run
from windowlm import load
from windowlm.errors import UserError
from windowlm.interchange.export import export_to_transformers
from windowlm.model_folder import find_model_folder
from windowlm.tokenization.tokenizer import BytesTokenizer


@torch.no_grad()
def test_a_name_of_the_hub_is_downloaded_where_no_folder_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    model = random_decoder()
    export_to_transformers(model, BytesTokenizer(), tmp_path / "cache", sequence_length=64, card="")
    asked = []

    def download(name: str, **patterns: list[str]) -> str:
        # An index may name shards as it likes.
        names = ["config.json", "model.safetensors", "shard-00001-of-00002.safetensors"]
        others = ["consolidated.safetensors", "original/model.safetensors", "onnx/config.json", "x.bin"]
        assert list(filter_repo_objects([*names, *others], **patterns)) == names
        asked.append(name)
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    tokens_BT = torch.randint(255, (1, 40))
    torch.testing.assert_close(load("owner/a-name").model(tokens_BT), model(tokens_BT), atol=1e-4, rtol=0)
    assert asked == ["owner/a-name"]


def test_a_name_that_the_hub_does_not_give_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **patterns: list[str]) -> str:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"no such folder, and the hub .*ConnectionError: no route to host\)"):
        load("owner/name")


@pytest.mark.parametrize("name", ["a/b/c", "../x", "nowhere", "a b/c", "/x/y", "~/x"])
def test_what_is_no_name_of_the_hub_is_not_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(UserError, match="there is no such folder; give a run's folder"):
        load(name)


def test_a_run_and_its_model_are_the_same(tmp_path: Path) -> None:
    save_run(tmp_path, random_decoder())
    (tmp_path / "config.json").write_text(json.dumps({"model": {}, "data": {}}))
    assert find_model_folder(tmp_path) == find_model_folder(tmp_path / "model")
    assert not find_model_folder(tmp_path).foreign


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "config.json: holds a list and not an object"), ('{"a', "config.json: not JSON: ")],
)
def test_a_config_that_says_nothing_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        find_model_folder(tmp_path)
