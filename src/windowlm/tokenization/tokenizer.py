"""The tokenizers: bytes, and byte-level BPE trained here or read from a file.

Both stand for exact bytes: the `token_bytes_V` of a text's tokens sum to its UTF-8 bytes, which bits per byte
divide by. So everything that changes text before it is cut into tokens (normalisation, a space in front,
lower case) is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from windowlm.json_text import parse_json
from windowlm.tokenization.training import BYTE_OF_CHARACTER, PRE_TOKENIZER

# Without an explicit choice the library warns at every later fork, such as a data loader's workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

DESCRIPTION_NAME = "tokenizer_description.json"
_TOKENIZER = "tokenizer.json"
LARGEST_VOCABULARY = 2**24
END_MARK = "<|endoftext|>"  # of bytes, where other programs want a text for it
_GPT2_PRE_TOKENIZER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


class Tokenizer(ABC):
    """Maps text to token ids and back without loss.

    Attributes:
        vocabulary_size: Number of ids, V.
        end_of_document: Id of the end mark, which no text encodes to.
        token_bytes_V: int64 `[V]`, UTF-8 bytes that each token stands for; 0 for the end mark.
        identity: Hash of all that decides the ids; equal for equal tokenizers.
        splits_pieces: Whether the pieces of `pieces.split_text`, encoded one by one, give the text's ids.
    """

    vocabulary_size: int
    end_of_document: int
    token_bytes_V: NDArray[np.int64]  # noqa: N815
    identity: str
    splits_pieces: bool

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.uint32]:
        """Ids of the text, without an end mark; text that spells the end mark gives ordinary ids."""

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int] | NDArray[Any]) -> bytes:
        """Exact UTF-8 bytes of the ids, without end marks; cut ids may give a cut character."""

    def decode(self, ids: Iterable[int] | NDArray[Any]) -> str:
        """Text of the ids, without end marks; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Content of each of the JSON files of which the tokenizer can be loaded, by its name."""

    def save(self, folder: Path) -> None:
        """Write `files` into the folder, which is made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)

    @abstractmethod
    def as_library_tokenizer(self) -> tuple[tokenizers.Tokenizer, str]:
        """The same ids by a tokenizer of the tokenizers library, and the text of its end mark."""

    @staticmethod
    def load(folder: Path) -> Tokenizer:
        """Read a tokenizer that `save` wrote.

        Raises:
            ValueError: The folder holds no tokenizer, a damaged one, or one that is not byte-level.
        """
        path = Path(folder) / DESCRIPTION_NAME
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} holds no tokenizer: {DESCRIPTION_NAME} is missing")
        description = parse_json(path.read_text(encoding="utf-8"))
        match description:
            case {"kind": "bytes"}:
                return BytesTokenizer()
            case {"kind": "bpe", "end_mark": str(end_mark)}:
                size = description.get("vocabulary_size", 0)
                if not isinstance(size, int):
                    raise ValueError(f"{str(path)!r}: vocabulary_size={size!r} is no whole number")
                return BytePairTokenizer.from_file(Path(folder) / _TOKENIZER, end_mark, size)
        raise ValueError(f"{str(path)!r} describes no tokenizer: {description!r}")


class BytesTokenizer(Tokenizer):
    """Every UTF-8 byte is a token; 0xFF, which UTF-8 never holds, ends documents."""

    vocabulary_size = 256
    end_of_document = 0xFF
    identity = "bytes"
    splits_pieces = True

    def __init__(self) -> None:
        self.token_bytes_V = np.ones(256, dtype=np.int64)
        self.token_bytes_V[self.end_of_document] = 0

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def decode_bytes(self, ids: Iterable[int] | NDArray[Any]) -> bytes:  # noqa: D102
        return bytes(int(token) for token in ids if token != self.end_of_document)

    def files(self) -> dict[str, bytes]:  # noqa: D102
        return _description({"kind": "bytes"})

    def as_library_tokenizer(self) -> tuple[tokenizers.Tokenizer, str]:  # noqa: D102
        # The end mark takes the id of the byte that no text holds.
        vocabulary = {
            character: byte for character, byte in BYTE_OF_CHARACTER.items() if byte != self.end_of_document
        }
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens([tokenizers.AddedToken(END_MARK, special=True, normalized=False)])
        library.encode_special_tokens = True
        return library, END_MARK


class BytePairTokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016 over bytes, as in GPT-2) of the tokenizers library.

    Args:
        tokenizer: A byte-level tokenizer; the end mark is added to it where it is absent.
        end_mark: The special token that ends documents.
        least_size: Ids at least; those that stand for no token of the tokenizer, as some models have in the
            end of their embedding, stand for no bytes.

    Raises:
        ValueError: The tokenizer changes text or does not cover all bytes.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_mark: str, least_size: int = 0) -> None:
        _check_byte_level(json.loads(tokenizer.to_str()))
        tokenizer.add_special_tokens([tokenizers.AddedToken(end_mark, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._end_mark = end_mark
        self.end_of_document = tokenizer.get_vocab(with_added_tokens=True)[end_mark]
        largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
        if least_size > LARGEST_VOCABULARY:
            raise ValueError(f"its model has {least_size:,} rows, and no tokenizer has so many tokens")
        self.vocabulary_size = max(largest + 1, least_size)
        self._bytes_of_token = self._spell_tokens()
        self.token_bytes_V = np.array([len(spelled) for spelled in self._bytes_of_token], dtype=np.int64)
        content = json.dumps([json.loads(tokenizer.to_str()), end_mark], sort_keys=True)
        self.identity = hashlib.sha256(content.encode("utf-8")).hexdigest()
        pre_tokenizer = json.loads(tokenizer.to_str())["pre_tokenizer"]
        added_text = [token for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
        self.splits_pieces = pre_tokenizer in (PRE_TOKENIZER, _GPT2_PRE_TOKENIZER) and not added_text

    @classmethod
    def from_file(cls, path: Path, end_mark: str, least_size: int = 0) -> BytePairTokenizer:
        """Read a tokenizer.json of the tokenizers library.

        Raises:
            ValueError: The file is missing, not a tokenizer.json, or not byte-level.
        """
        if not path.is_file():
            raise ValueError(f"tokenizer.path={str(path)!r}: no such file; give a tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.path={str(path)!r}: not a tokenizer.json: {error}") from error
        try:
            return cls(tokenizer, end_mark, least_size)
        except ValueError as error:
            raise ValueError(
                f"tokenizer.path={str(path)!r}: {error}, so bytes per token would not be exact; "
                "use a byte-level BPE (GPT-2, Llama 3 and Qwen have one) or tokenizer=bpe"
            ) from error

    def encode(self, text: str) -> NDArray[np.uint32]:  # noqa: D102
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """`encode` of each text, on all cores."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode_bytes(self, ids: Iterable[int] | NDArray[Any]) -> bytes:  # noqa: D102
        return b"".join(map(self._bytes_of_token.__getitem__, ids))

    def files(self) -> dict[str, bytes]:  # noqa: D102
        size = self.vocabulary_size
        description = {"kind": "bpe", "end_mark": self._end_mark, "vocabulary_size": size}
        return _description(description) | {_TOKENIZER: self._tokenizer.to_str(pretty=True).encode()}

    def as_library_tokenizer(self) -> tuple[tokenizers.Tokenizer, str]:  # noqa: D102
        return self._tokenizer, self._end_mark

    def _spell_tokens(self) -> list[bytes]:
        """The bytes of each id; special tokens stand for none."""
        spelled = [b""] * self.vocabulary_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            spelled[index] = bytes(BYTE_OF_CHARACTER[character] for character in token)
        for index, added in self._tokenizer.get_added_tokens_decoder().items():
            spelled[index] = b"" if added.special else added.content.encode("utf-8")
        return spelled


def _check_byte_level(description: dict[str, Any]) -> None:
    """Raise ValueError unless the tokenizer.json keeps every byte of the text."""
    model = description["model"]
    if model["type"] != "BPE":
        raise ValueError(f"its model is {model['type']}, not BPE")
    if missing := BYTE_OF_CHARACTER.keys() - model["vocab"].keys():
        raise ValueError(f"it is not byte-level: {len(missing)} of the 256 bytes have no token")
    if description["normalizer"] is not None:
        raise ValueError(f"its normalizer {description['normalizer']['type']} changes the text")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise ValueError("its model marks words or drops merges")
    pre_tokenizer = description["pre_tokenizer"] or {"type": "none"}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not any(step["type"] == "ByteLevel" for step in steps):
        raise ValueError("it is not byte-level: its pre-tokenizer has no ByteLevel step")
    for step in steps:
        if step["type"] not in ("ByteLevel", "Split", "Digits") or step.get("behavior") == "Removed":
            raise ValueError(f"its pre-tokenizer step {step['type']} may change the text")
        if step.get("add_prefix_space"):
            raise ValueError("it puts a space before the text (add_prefix_space)")
    for added in description["added_tokens"]:
        if not added["special"] and (added["lstrip"] or added["rstrip"]):
            raise ValueError(f"its added token {added['content']!r} swallows white space")


def _description(description: dict[str, Any]) -> dict[str, bytes]:
    return {DESCRIPTION_NAME: f"{json.dumps(description)}\n".encode()}
