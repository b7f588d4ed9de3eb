"""Which documents a finished run is scored on."""

import json
from types import SimpleNamespace

import pytest

from windowlm.data.config import DataConfig
from windowlm.data.errors import DataError
from windowlm.data.token_store import prepare_tokens
from windowlm.errors import UserError
from windowlm.evaluation.scored_documents import scored_documents
from windowlm.tokenization.config import TokenizerConfig


@pytest.fixture
def bundle(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"{number}.txt").write_text(f"text {number} " * 20)
    settings = {
        "name": "text",
        "path": str(texts),
        "sequence_length": 16,
        "cache_dir": str(tmp_path / "cache"),
    }
    prepared = prepare_tokens(DataConfig(**settings), TokenizerConfig(kind="bytes"))
    config = {"data": settings, "source_identity": prepared.source_identity}
    return SimpleNamespace(folder=tmp_path, tokenizer=prepared.tokenizer, config=config, prepared=prepared)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_without_a_path_it_is_the_runs_own_split(bundle, split):
    documents, identity = scored_documents(bundle, split, {})
    own = getattr(bundle.prepared, split)
    assert [documents.document_hash(i) for i in range(len(documents))] == [
        own.document_hash(i) for i in range(len(own))
    ]
    assert identity == bundle.config["source_identity"]


@pytest.mark.parametrize("of_run", [True, False])
def test_a_run_that_was_handed_on_names_no_place_to_write_to(bundle, tmp_path, monkeypatch, of_run):
    monkeypatch.setattr("windowlm.data.arrow_store.__file__", str(tmp_path / "installed/a/b/arrow_store.py"))
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "some" / "place"
    bundle.config["data"]["cache_dir"] = str(place)
    scored_documents(bundle, "validation", {} if of_run else {"path": str(tmp_path / "texts")})
    assert not place.parent.exists()
    assert (tmp_path / "data" / "documents").is_dir()


@pytest.mark.parametrize("cache", [5, ["a"]])
def test_a_cache_folder_that_is_no_text_is_named(bundle, cache):
    bundle.config["data"]["cache_dir"] = cache
    with pytest.raises(UserError, match=r"^data\.cache_dir="):
        scored_documents(bundle, "validation", {})


def test_own_data_that_have_changed_are_refused(bundle):
    (bundle.folder / "texts" / "new.txt").write_text("a new one")
    with pytest.raises(UserError, match=r"not those of its training.*data\.path=FILE"):
        scored_documents(bundle, "validation", {})


def test_a_split_that_the_data_do_not_have_is_named(bundle, tmp_path):
    folder = tmp_path / "stated"
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text(f"{split} " * 20)
    bundle.config["data"]["path"] = str(folder)
    prepared = prepare_tokens(DataConfig(**bundle.config["data"]), TokenizerConfig(kind="bytes"))
    bundle.config["source_identity"] = prepared.source_identity
    assert len(scored_documents(bundle, "validation", {})[0]) == 1
    with pytest.raises(UserError, match=r"^evaluation\.split=test: these data have no test split"):
        scored_documents(bundle, "test", {})


def test_other_fractions_would_score_text_of_the_training_and_are_refused(bundle):
    with pytest.raises(UserError, match="not those of its training"):
        scored_documents(bundle, "validation", {"validation_fraction": 0.4})


def test_a_path_gives_all_its_documents_whole(bundle, tmp_path):
    book = tmp_path / "a book, with = and 'quotes'.txt"
    book.write_text("word " * 100)
    documents, identity = scored_documents(bundle, "validation", {"path": str(book)})
    assert len(documents) == 1
    assert documents.name == "all"
    assert bundle.tokenizer.decode(documents.read(0, 0, 10_000)) == "word " * 100
    assert identity != bundle.config["source_identity"]


def test_a_path_does_not_inherit_the_runs_excluded_documents(bundle, tmp_path):
    exclude = tmp_path / "exclude.json"
    exclude.write_text(json.dumps([{"title": "0.txt"}]))
    bundle.config["data"]["exclude"] = str(exclude)
    documents, _ = scored_documents(bundle, "validation", {"path": str(tmp_path / "texts")})
    assert len(documents) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pth": "x"}, r"^data\.pth: there is no such setting; there are .*path"),
        ({"path": "x", "documents": 0}, r"^data\.documents=0: at least 1; try data\.documents="),
        ({"path": "x", "documents": True}, r"^data\.documents=True: .*integer"),
        ({"path": 3}, r"^data\.path=3: .*string"),
    ],
)
def test_wrong_settings_are_named(bundle, settings, message):
    with pytest.raises(UserError, match=message):
        scored_documents(bundle, "validation", settings)


def test_a_missing_path_is_named(bundle, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        scored_documents(bundle, "validation", {"path": str(tmp_path / "nowhere")})
