"""Random text of a known vocabulary, from a seed, for measurements that must not depend on a corpus."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from windowlm.tokenization.training import train_bpe

BYTES = 256
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))
SHORTEST_WORD, LONGEST_WORD = 3, 9
MEDIAN_DOCUMENT, SHORTEST_DOCUMENT = 1500, 64
VALIDATION_TOKENS = 80_000
END_MARK = "<|endoftext|>"


def write_text(folder: Path, vocabulary_size: int, tokens: int, seed: int) -> list[str]:
    """Write documents and, unless the tokens are bytes, a tokenizer of exactly this vocabulary.

    Documents have log-normal lengths (sigma 1, like web text), words are drawn uniformly.

    Args:
        folder: where ``train.jsonl``, ``validation.jsonl`` and ``tokenizer.json`` go.
        vocabulary_size: V, the end mark included; 256 is the bytes.
        tokens: of the training split, about.
        seed: of all that is drawn.

    Returns:
        What to say on the command line of ``train.py`` to read them.
    """
    draw = np.random.default_rng(seed)
    lengths = draw.integers(SHORTEST_WORD, LONGEST_WORD + 1, size=max(vocabulary_size, 2000))
    words = np.array(["".join(draw.choice(LETTERS, length)) for length in lengths], dtype=object)
    if vocabulary_size == BYTES:
        tokens_per_word = float(lengths.mean()) + 1
        said = ["tokenizer=bytes"]
    else:
        lexicon = " " + " ".join(words)
        tokenizer = train_bpe([lexicon], vocabulary_size, END_MARK)
        # With as many words as tokens there are always enough merges.
        assert tokenizer.get_vocab_size() == vocabulary_size
        tokenizer.save(str(folder / "tokenizer.json"))
        tokens_per_word = len(tokenizer.encode(lexicon).ids) / len(words)
        said = ["tokenizer=file", f"tokenizer.path={folder / 'tokenizer.json'}"]
    for split, wanted in (("train", tokens), ("validation", VALIDATION_TOKENS)):
        written = 0
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            while written < wanted:
                length = max(SHORTEST_DOCUMENT, int(MEDIAN_DOCUMENT * draw.lognormal()))
                text = " ".join(draw.choice(words, max(1, int(length / tokens_per_word))))
                file.write(json.dumps({"text": text}) + "\n")
                written += length
    return [f"data.path={folder}", *said]


def read_tokens(folder: Path, count: int) -> npt.NDArray[np.int64]:
    """The first tokens of the training split that `write_text` wrote, end marks among them; [count].

    It begins again where it ends.
    """
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
    found: list[int] = []
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            if tokenizer is None:
                found += text.encode()
            else:
                found += [*tokenizer.encode(text).ids, tokenizer.token_to_id(END_MARK)]
            if len(found) >= count:
                break
    return np.resize(np.array(found, dtype=np.int64), count)
