"""The tokenizer of the settings: ready, from a file, or trained once on the training split."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from windowlm.data.errors import DataError
from windowlm.data.identity import code_version, hash_of
from windowlm.data.kept_folder import make_once
from windowlm.data.progress import progress_bar
from windowlm.data.text_store import TextStore
from windowlm.tokenization import training as training_module
from windowlm.tokenization.config import TokenizerConfig
from windowlm.tokenization.tokenizer import BytePairTokenizer, BytesTokenizer, Tokenizer
from windowlm.tokenization.training import train_bpe
from windowlm.tokenization.transformers_files import read_model_tokenizer


def prepare_tokenizer(
    config: TokenizerConfig, texts: TextStore, training_documents: NDArray[np.int64], folder: Path
) -> Tokenizer:
    """The tokenizer of the settings; a BPE is trained on the training split, once, and kept.

    Args:
        config: The settings.
        texts: All documents.
        training_documents: int64 `[documents]`, numbers of those in the training split.
        folder: Cache folder.

    Raises:
        DataError: The file of `kind=file`, or the folder of `kind=folder`, cannot be used.
    """
    if config.kind == "bytes":
        return BytesTokenizer()
    if config.kind == "folder":
        try:
            return read_model_tokenizer(Path(str(config.path)).expanduser())
        except ValueError as error:
            raise DataError(f"tokenizer.path={config.path}: {error}") from error
        except OSError as error:
            raise _unreadable(config, error) from None
    if config.kind == "file":
        try:
            return BytePairTokenizer.from_file(Path(str(config.path)).expanduser(), config.end_mark)
        except ValueError as error:
            raise DataError(str(error)) from error
        except OSError as error:
            raise _unreadable(config, error) from None
    settings = [config.vocabulary_size, config.training_bytes, config.end_mark, tokenizers.__version__]
    trained_on = texts.digests[training_documents].tobytes()
    target = folder / "tokenizers" / hash_of(trained_on, *settings, code_version(training_module))

    def train(place: Path) -> None:
        rows = np.concatenate([np.arange(*texts.first_rows[[d, d + 1]]) for d in training_documents])
        size = int(texts.byte_counts[training_documents].sum())
        sample = rows[:: -(-size // config.training_bytes)]
        with progress_bar("training the tokenizer", min(size, config.training_bytes)) as advance:
            pieces = _advancing(texts.pieces(sample), advance)
            library = train_bpe(pieces, config.vocabulary_size, config.end_mark)
        BytePairTokenizer(library, config.end_mark).save(place)

    make_once(target, train)
    return Tokenizer.load(target)


def _unreadable(config: TokenizerConfig, error: OSError) -> DataError:
    return DataError(f"tokenizer.path={config.path}: cannot be read: {error.strerror or error}")


def _advancing(pieces: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    for piece in pieces:
        yield piece
        advance(len(piece))
