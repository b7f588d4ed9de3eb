"""Settings of the tokenizer."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from windowlm.setting_text import setting_text


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer reads the text.

    Attributes:
        kind: `bpe` trains a byte-level BPE on the training split, `bytes` uses the 256 byte values,
            `file` reads a byte-level tokenizer.json, `folder` takes that of a model's folder.
        vocabulary_size: Tokens of a trained BPE, end mark included; data too small for it gives fewer.
        training_bytes: Text that the BPE is trained on, in bytes, spread evenly over the training split.
        path: The tokenizer.json of `kind=file`; the folder of `kind=folder`, of a run or a model of ours, or
            in transformers' layout.
        end_mark: Special token that ends documents; added to the tokenizer where it is absent.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["bpe", "bytes", "file", "folder"] = "bpe"
    vocabulary_size: int = 4096
    training_bytes: int = 256_000_000
    path: str | None = None
    end_mark: str = "<|endoftext|>"

    def __post_init__(self) -> None:
        """Check ranges and relations.

        Raises:
            ValueError: A value out of range, or `kind` and `path` contradict each other.
        """
        if self.vocabulary_size < 257:
            raise ValueError(
                f"vocabulary_size={self.vocabulary_size!r}: at least 257, the 256 bytes and the end mark; "
                "try vocabulary_size=4096"
            )
        if self.training_bytes < 1:
            raise ValueError(
                f"training_bytes={self.training_bytes!r}: at least 1; try training_bytes=256000000"
            )
        if self.kind == "file" and not self.path:
            raise ValueError(
                f"path={setting_text(self.path)}: kind=file reads a tokenizer.json; try path=tokenizer.json"
            )
        if self.kind == "folder" and not self.path:
            raise ValueError(
                f"path={setting_text(self.path)}: kind=folder takes a model's tokenizer; try path=FOLDER"
            )
        if self.kind not in ("file", "folder") and self.path is not None:
            raise ValueError(
                f"path={setting_text(self.path)}: only kind=file and kind=folder read a path; try path=null"
            )
        if not self.end_mark:
            raise ValueError("end_mark='': a special token that is not empty; try end_mark='<|endoftext|>'")
