"""Tokenizers as the files that transformers' AutoTokenizer reads without further code."""

import json
from pathlib import Path
from typing import Any

from windowlm.tokenization.tokenizer import Tokenizer

TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "tokenizer_config.json"


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
