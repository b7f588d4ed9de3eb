"""Random models and texts that the tests of the interchange share."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.tokenization.tokenizer import BytePairTokenizer, BytesTokenizer, Tokenizer
from windowlm.tokenization.training import train_bpe

SHAPE: dict[str, Any] = {
    "layers": 4,
    "dim": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "feed_forward_dim": 48,
    "window": 8,
}
TEXT = (
    "def window(keys):\n    return [key for key in keys if 0 <= 7 - key < 3]\n\n"
    "Größe 😀 漢字, naïve  spaces\t\tand <|endoftext|> spelled; it's 12345 e\u0301!\r\n"
) * 3


def random_decoder(seed: int = 0, vocabulary_size: int = 256, **changes: Any) -> Decoder:
    """Weights so large that attention is far from uniform and every key matters."""
    torch.manual_seed(seed)
    model = Decoder(ModelConfig(**{**SHAPE, **changes}), vocabulary_size).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def trained_bpe() -> Tokenizer:
    """A byte-level BPE of our own training."""
    return BytePairTokenizer(train_bpe([TEXT], 300, "<|endoftext|>"), "<|endoftext|>")


def save_run(folder: Path, model: Decoder, tokenizer: Tokenizer | None = None) -> None:
    """A finished run as far as its model goes."""
    from windowlm.bundle import save_bundle

    tokenizer = tokenizer or BytesTokenizer()
    config = {
        "model": asdict(model.config),
        "vocabulary_size": model.vocabulary_size,
        "sequence_length": 64,
        "source_identity": "source",
        "tokenizer_identity": tokenizer.identity,
        "data": {"name": "text", "path": "books"},
        "tokenizer": {"kind": "bytes"},
        "training": {"tokens_trained": 12345, "steps_trained": 7, "precision": "32-true"},
    }
    save_bundle(folder / "model", model.state_dict(), config, tokenizer)
