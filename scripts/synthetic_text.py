"""Random text of a known vocabulary, from a seed, for measurements that must not depend on a corpus."""

import json
from pathlib import Path

import numpy as np

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
