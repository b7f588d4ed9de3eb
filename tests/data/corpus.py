"""Small documents for the tests, and short ways to prepare them."""

import random
from itertools import chain
from pathlib import Path

from windowlm.data.config import DataConfig
from windowlm.data.token_store import PreparedData, prepare_tokens
from windowlm.tokenization.config import TokenizerConfig

WORDS = ["the", "cat", "sat", "on", "a", "mat", "12", "birds,", "é", "世界", "(it)", "ran.", "\n"]


def text(seed: int, words: int = 60) -> str:
    """Text that differs between seeds."""
    draw = random.Random(seed)
    return f"{seed}: " + " ".join(draw.choices(WORDS, k=words))


def write_documents(folder: Path, count: int, words: int = 60) -> Path:
    """A folder of `count` text files."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        (folder / f"{seed:03}.txt").write_text(text(seed, words), encoding="utf-8")
    return folder


def settings(path: Path | str, cache: Path, **others: object) -> DataConfig:
    """Settings that read `path` and cache in `cache`, for short sequences."""
    defaults: dict[str, object] = {"name": "text", "sequence_length": 16, "batch_size": 4}
    return DataConfig(path=str(path), cache_dir=str(cache), **{**defaults, **others})  # type: ignore[arg-type]


def prepare(path: Path | str, cache: Path, tokenizer: str = "bytes", **others: object) -> PreparedData:
    """Prepare tokens, of bytes unless told otherwise."""
    config = TokenizerConfig(kind=tokenizer, vocabulary_size=300)  # type: ignore[arg-type]
    return prepare_tokens(settings(path, cache, **others), config)


def texts_of(prepared: PreparedData) -> dict[str, list[str]]:
    """The texts of each split, decoded from the tokens."""
    return {
        split.name: [prepared.tokenizer.decode(split.tokens(i)) for i in range(len(split))]
        for split in (prepared.train, prepared.validation, prepared.test)
    }


def all_texts(prepared: PreparedData) -> list[str]:
    """The texts of all splits, sorted."""
    return sorted(chain(*texts_of(prepared).values()))
