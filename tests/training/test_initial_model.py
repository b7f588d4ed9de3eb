"""A run that starts from a model: of ours, or in transformers' layout."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import run_script
from tests.interchange.foreign import save_foreign
from tests.interchange.models import random_decoder, save_run
from windowlm.attention.config import RotaryConfig
from windowlm.bundle import load
from windowlm.config import ConfigError
from windowlm.data.errors import DataError
from windowlm.data.trained_tokenizer import prepare_tokenizer
from windowlm.errors import UserError
from windowlm.model.config import ModelConfig
from windowlm.tokenization.config import TokenizerConfig
from windowlm.tokenization.tokenizer import BytesTokenizer
from windowlm.training.initial_model import adopt_initial_model, load_initial_weights


def composed(source: Path | None, **changes: Any) -> dict[str, Any]:
    model = {**asdict(ModelConfig()), "init_from": None if source is None else str(source), **changes}
    return {"model": model, "tokenizer": asdict(TokenizerConfig()), "seed": 3}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_run(tmp_path / "run", random_decoder(window=[8, None]))
    return tmp_path / "run"


def test_without_a_model_nothing_changes() -> None:
    values = composed(None, window=5)
    assert adopt_initial_model(values, {"model.window"}) == values


def test_shape_and_tokenizer_are_the_models(run: Path) -> None:
    found = adopt_initial_model(composed(run), {"model.init_from"})
    own = asdict(load(run).model.config)
    assert found["model"] == own | {"init_from": str(run)}
    assert found["tokenizer"]["kind"] == "folder"
    assert found["tokenizer"]["path"] == str(run / "model")
    assert found["seed"] == 3


def test_what_has_no_weights_may_be_changed(run: Path) -> None:
    changes = {"window": 4, "attention_dropout": 0.3}
    found = adopt_initial_model(composed(run, **changes), {"model.window", "model.attention_dropout"})
    assert {name: found["model"][name] for name in changes} == changes
    assert found["model"]["layers"] == 4
    # The default of a run, asked for.
    found = adopt_initial_model(composed(run), {"model.window"})
    assert found["model"]["window"] == ModelConfig().window


def test_a_part_of_the_rotation_is_changed_beside_the_rest_of_the_models(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    save_foreign(tmp_path, "qwen3, yarn")
    values = composed(tmp_path)
    values["model"]["rotary"] = {"base": 777.0, "fraction": 1.0, "scaling": None}
    rotary = adopt_initial_model(values, {"model.rotary.base"})["model"]["rotary"]
    assert rotary["base"] == 777.0
    assert rotary["scaling"]["kind"] == "yarn"


def test_a_part_of_a_rotation_that_a_list_gives_all_layers_is_changed_and_of_several_none(
    tmp_path: Path,
) -> None:
    yarn = {"kind": "yarn", "factor": 4.0, "original_length": 32}
    given = {f"model.rotary.scaling.{name}" for name in yarn}
    for name, bases in (("one", [5e5]), ("two", [1e4, 5e5])):
        pattern = [RotaryConfig(base=base) for base in bases]
        save_run(tmp_path / name, random_decoder(window=None, rotary=pattern))
    values = composed(tmp_path / "one", rotary={"base": 1e4, "fraction": 1.0, "scaling": yarn})
    (rotary,) = adopt_initial_model(values, given)["model"]["rotary"]
    assert (rotary["base"], rotary["scaling"]) == (5e5, yarn)
    values = composed(tmp_path / "two", rotary={"base": 1e4, "fraction": 1.0, "scaling": yarn})
    with pytest.raises(
        ConfigError, match=r"has a list there, .*; give all of it as model\.rotary=\["
    ) as raised:
        adopt_initial_model(values, given)
    assert raised.value.key == "model.rotary"


@pytest.mark.parametrize(("name", "value"), [("layers", 8), ("qk_norm", False), ("output_gate", True)])
def test_what_the_weights_do_not_fit_is_refused(run: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"model.{name}=") as raised:
        adopt_initial_model(composed(run, **{name: value}), set())
    assert raised.value.correction is not None
    assert raised.value.correction.startswith(f"model.{name}=")


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model.init_from=.*: there is no such folder"):
        adopt_initial_model(composed(tmp_path / "nowhere"), set())
    with pytest.raises(UserError, match=r"^model.init_from=.*config.json is missing"):
        adopt_initial_model(composed(tmp_path), set())


def test_weights_of_another_tokenizer_are_refused(run: Path) -> None:
    model, tokenizer = random_decoder(1, window=4), BytesTokenizer()
    tokenizer.identity = "another"
    with pytest.raises(UserError, match=r"^tokenizer: the data are in the tokens of another tokenizer"):
        load_initial_weights(model, tokenizer, str(run))


def test_weights_are_the_models_to_the_bit(run: Path) -> None:
    model = random_decoder(1, window=4)
    load_initial_weights(model, BytesTokenizer(), str(run))
    for name, weight in load(run).model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_the_tokenizer_of_a_folder_is_read(run: Path, tmp_path: Path) -> None:
    settings = TokenizerConfig(kind="folder", path=str(run))
    assert isinstance(prepare_tokenizer(settings, None, None, tmp_path), BytesTokenizer)  # type: ignore[arg-type]
    settings = TokenizerConfig(kind="folder", path=str(tmp_path))
    with pytest.raises(DataError, match=r"^tokenizer.path=.*tokenizer.json is missing"):
        prepare_tokenizer(settings, None, None, tmp_path)  # type: ignore[arg-type]


def test_a_foreign_model_is_windowed_and_trained_on(tmp_path: Path, documents: Path) -> None:
    pytest.importorskip("transformers")
    save_foreign(tmp_path / "llama", "llama")
    words = [
        "model.init_from=llama",
        f"data.path={documents}",
        "data.cache_dir=cache",
        "data.sequence_length=64",
        "data.batch_size=2",
        "data.validation_tokens=512",
        "evaluation.max_targets=128",
        "trainer.max_steps=2",
        "trainer.progress_bar=off",
        "logger=none",
    ]
    refused = run_script("train.py", *words, "model.dim=64", cwd=tmp_path)
    assert refused.returncode == 2
    assert "model.dim=64: model.init_from=llama has model.dim=32" in refused.stderr
    assert "model.dim=32" in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"llama"}
    done = run_script("train.py", *words, "model.window=8", "run_dir=run", "optimizer.lr=1e-12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained, before = load(tmp_path / "run"), load(tmp_path / "llama")
    assert trained.model.config.window == 8
    assert trained.model.config.qk_norm is False
    assert trained.tokenizer.identity == before.tokenizer.identity
    for name, weight in before.model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], weight, atol=1e-6, rtol=0)
    again = run_script(
        *("train.py", *words, "trainer.max_steps=4", "model.window=8", "run_dir=run", "resume=auto"),
        *("optimizer.lr=1e-12",),
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    assert "going on from step 2" in again.stdout
