from pathlib import Path
from typing import Any

import numpy as np
import pytest

from windowlm.config import ConfigError
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training.checkpoint_io import AtomicCheckpointIO
from windowlm.training.config import OptimizerConfig
from windowlm.training.lightning_module import LanguageModelModule
from windowlm.training.resuming import read_checkpoint
from windowlm.training.schedule import Budget


def module(vocabulary: int = 20, tokenizer: str = "one") -> LanguageModelModule:
    shape = ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=8, window=4)
    return LanguageModelModule(
        Decoder(shape, vocabulary),
        OptimizerConfig(),
        Budget(steps=3),
        np.ones(vocabulary, dtype=np.int64),
        sequence_length=8,
        batch_size=1,
        accumulate_batches=1,
        seed=0,
        identities={"source_identity": "text", "tokenizer_identity": tokenizer},
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    trained = module()
    checkpoint: dict[str, Any] = {
        "state_dict": trained.state_dict(),
        "optimizer_states": [],
        "lr_schedulers": [],
        "callbacks": {"MetricsWriter": {}, "CheckpointWriter": {}},
        "loops": {},
        "DocumentDataModule": {"next_batch": 0},
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.6",
    }
    trained.on_save_checkpoint(checkpoint)
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_checkpoint_of_the_same_run_is_read(path: Path) -> None:
    assert read_checkpoint(path, module())["windowlm"]["batches_trained"] == 0


def test_another_tokenizer_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_identity one there, two here") as refused:
        read_checkpoint(path, module(tokenizer="two"))
    assert "source_identity" not in str(refused.value)


def test_a_tensor_of_another_shape_is_named(path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.embedding\.weight is \(20, 16\) there and \(21, 16\) here"
    ):
        read_checkpoint(path, module(vocabulary=21))


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match="not written by this version of windowlm: windowlm is missing"):
        read_checkpoint(tmp_path / "last.ckpt", module())
