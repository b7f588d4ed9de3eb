"""Tokenizers as the files that transformers' AutoTokenizer reads without further code, and back."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from windowlm.json_text import parse_json
from windowlm.tokenization.tokenizer import DESCRIPTION_NAME, BytePairTokenizer, BytesTokenizer, Tokenizer
from windowlm.tokenization.training import BYTE_OF_CHARACTER

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"
MODEL_NAME, GENERATION_NAME = "config.json", "generation_config.json"


def write_transformers_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``; AutoTokenizer then gives the same ids.

    Nothing is put around a text, and one that spells the end mark stays text, as in ``Tokenizer.encode``.

    Args:
        tokenizer: of the model.
        folder: is there.
    """
    library, end_mark = tokenizer.as_library_tokenizer()
    content = json.loads(library.to_str())
    # A tokenizer.json from elsewhere may put marks around texts, which no text of the training had.
    content["post_processor"] = None
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_mark,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER_NAME).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def read_model_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a run's or a model's folder, in our layout or transformers'.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    for place in (folder, folder / "model"):
        if (place / DESCRIPTION_NAME).is_file():
            return Tokenizer.load(place)
    return read_transformers_files(folder)


def read_transformers_files(folder: Path) -> Tokenizer:
    """Read the tokenizer of a folder in transformers' layout.

    What the file puts around a text, such as a mark before it, is left away. So is Unicode's composition of
    characters (NFC), which Qwen's files ask for and which changes bytes: ids are those of AutoTokenizer for
    all text that is composed already, as nearly all is. As many ids are known as the model's embedding has
    rows.

    Raises:
        ValueError: a file is missing or damaged, there is no end mark, more tokens than the model has
            rows, or the tokenizer is not byte-level.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise ValueError(
            f"{TOKENIZER_NAME} is missing; the tokenizers library's file is the one that is read"
        )
    content, settings, model = (
        _object(folder / name) for name in (TOKENIZER_NAME, SETTINGS_NAME, MODEL_NAME)
    )
    content["post_processor"] = None
    if content.get("normalizer") in ({"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}):
        content["normalizer"] = None
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{TOKENIZER_NAME} is not a tokenizer's file: {error}") from None
    end_mark = _end_mark(library, settings, model)
    rows = model.get("vocab_size", 0)
    if not isinstance(rows, int):
        raise ValueError(f"{MODEL_NAME}: vocab_size={rows!r} is no whole number")
    if _is_bytes(library, library.token_to_id(end_mark)):
        tokenizer: Tokenizer = BytesTokenizer()
    else:
        try:
            tokenizer = BytePairTokenizer(library, end_mark, rows)
        except ValueError as error:
            raise ValueError(
                f"{TOKENIZER_NAME}: {error}, so bytes per token would not be exact; byte-level BPE is read, "
                "as GPT-2, Llama 3, Qwen and SmolLM have it"
            ) from None
    if rows and tokenizer.vocabulary_size != rows:
        raise ValueError(
            f"it has {tokenizer.vocabulary_size} tokens and the embedding of {MODEL_NAME} {rows} rows; the "
            "files are of different models"
        )
    return tokenizer


def _end_mark(library: tokenizers.Tokenizer, settings: dict[str, Any], model: dict[str, Any]) -> str:
    mark = settings.get("eos_token")
    if isinstance(mark, dict):
        mark = mark.get("content")
    if mark is None:
        number = model.get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        mark = library.id_to_token(number) if isinstance(number, int) else None
    if not isinstance(mark, str) or library.token_to_id(mark) is None:
        raise ValueError(
            f"it has no end mark: {SETTINGS_NAME} must name one of its tokens as eos_token, or {MODEL_NAME} "
            "as eos_token_id"
        )
    return mark


def end_marks(folder: Path) -> list[int]:
    """Ids that end a text in config.json or generation_config.json: one, some or none in each.

    Raises:
        ValueError: they are no whole numbers, or a file is damaged.
    """
    found: set[int] = set()
    for name in (MODEL_NAME, GENERATION_NAME):
        given = _object(folder / name).get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
            raise ValueError(
                f"{name}: eos_token_id={given!r}: a whole number, a list of them or null is allowed"
            )
        found |= set(ids)
    return sorted(found)


def _is_bytes(library: tokenizers.Tokenizer, end_mark: int | None) -> bool:
    """Whether the ids are the bytes, as `write_transformers_files` writes them."""
    known = library.get_vocab(with_added_tokens=False)
    return end_mark == BytesTokenizer.end_of_document and known == {
        character: byte for character, byte in BYTE_OF_CHARACTER.items() if byte != end_mark
    }


def _object(path: Path) -> dict[str, Any]:
    """An object of JSON; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content
