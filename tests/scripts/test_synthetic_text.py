"""Random text for benchmarks."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT
from windowlm.data.config import DataConfig
from windowlm.data.token_store import prepare_tokens
from windowlm.tokenization.tokenizer import BytePairTokenizer, BytesTokenizer


@pytest.fixture
def write_text(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    import synthetic_text

    return synthetic_text.write_text


@pytest.mark.parametrize("vocabulary_size", [258, 1000, 5000])
def test_the_vocabulary_is_exact_and_the_tokens_are_about_as_many(
    write_text: Any, tmp_path: Path, vocabulary_size: int
) -> None:
    said = write_text(tmp_path, vocabulary_size, 200_000, seed=0)
    assert said[:2] == [f"data.path={tmp_path}", "tokenizer=file"]
    tokenizer = BytePairTokenizer.from_file(tmp_path / "tokenizer.json", "<|endoftext|>")
    assert tokenizer.vocabulary_size == vocabulary_size
    documents = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    encoded = sum(map(len, tokenizer.encode_batch(documents)))
    assert encoded == pytest.approx(200_000, rel=0.15)


@pytest.mark.parametrize("vocabulary_size", [256, 1000])
def test_its_tokens_are_those_that_a_run_reads(write_text: Any, tmp_path: Path, vocabulary_size: int) -> None:
    from synthetic_text import read_tokens

    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text", vocabulary_size, 5_000, seed=0)
    path, cache = str(tmp_path / "text"), str(tmp_path / "cache")
    data = DataConfig(name="text", path=path, sequence_length=64, cache_dir=cache)
    tokenizer: BytesTokenizer | BytePairTokenizer = BytesTokenizer()
    if vocabulary_size != 256:
        file = tmp_path / "text" / "tokenizer.json"
        tokenizer = BytePairTokenizer.from_file(file, "<|endoftext|>")
    first = prepare_tokens(data, tokenizer).train.read(0, 0, 200)
    found = read_tokens(tmp_path / "text", 20_000)
    assert found[: min(len(first), 50)].tolist() == first[:50].tolist()
    assert found.max() < vocabulary_size
    assert len(found) == 20_000


def test_a_seed_gives_the_same_bytes_again(write_text: Any, tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name
        folder.mkdir()
        assert write_text(folder, 256, 10_000, seed)[1:] == ["tokenizer=bytes"]
        texts.append((folder / "train.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]
