"""A table of wrong inputs: settings, command lines, data, tokenizers, checkpoints, results.

An entry is a name, what to make in the working folder, and the words of the command.
"""

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

Make = Callable[[Path], Any]


@dataclass(frozen=True)
class BadInput:
    """One wrong input.

    Args:
        name: of the test.
        words: of the command line.
        said: what the message must hold, which is never nothing.
        make: writes files into the working folder, which holds `books/` with good text and `run/`, a finished
            run.
        command: train, or the name of a script.
        locked: what may not be read or entered meanwhile.
    """

    name: str
    words: tuple[str, ...]
    said: str
    make: Make = lambda folder: None
    command: str = "train"
    locked: tuple[str, ...] = ()


AT_LEAST_ONE = (
    "model.layers",
    "model.heads",
    "model.head_dim",
    "model.feed_forward_dim",
    "data.sequence_length",
    "data.batch_size",
    "trainer.max_steps",
    "trainer.max_tokens",
    "trainer.accumulate_batches",
    "trainer.log_every_n_steps",
    "checkpoint.every_n_steps",
    "evaluation.batch_tokens",
)
ABOVE_ZERO = ("optimizer.lr", "optimizer.epsilon", "trainer.max_seconds", "trainer.max_time")
SHARES = ("optimizer.warmup_fraction", "optimizer.final_lr_fraction", "data.validation_fraction")
CHOICES = (
    "precision",
    "trainer.device",
    "trainer.loss",
    "trainer.compile",
    "optimizer.kind",
    "optimizer.schedule",
    "logger.kind",
    "logger.mode",
    "tokenizer.kind",
    "data.name",
    "evaluation.split",
    "evaluation.precision",
    "checkpoint.on_failed_write",
    "model.activation",
)
SWITCHES = (
    "model.output_gate",
    "model.learned_sinks",
    "data.document_masking",
    "trainer.deterministic",
    "plan",
)


def settings() -> Iterator[BadInput]:
    """Values that no setting of the kind takes."""
    for key in AT_LEAST_ONE:
        for value in ("0", "1.5", "abc", "true"):
            yield BadInput(f"{key}={value}", (f"{key}={value}",), key)
    for key in ABOVE_ZERO:
        for value in ("0", "inf", "nan", "abc", "[1]"):
            yield BadInput(f"{key}={value}", (f"{key}={value}",), key)
    for key in SHARES:
        for value in ("-0.1", "1.5", "abc", "true"):
            yield BadInput(f"{key}={value}", (f"{key}={value}",), key)
    for key in CHOICES:
        for value in ("nothing", "3", "[a]"):
            yield BadInput(f"{key}={value}", (f"{key}={value}",), key)
    for key in SWITCHES:
        for value in ("3", "perhaps", "[true]"):
            yield BadInput(f"{key}={value}", (f"{key}={value}",), key)
    for key in ("seed", "data.split_seed", "data.workers", "trainer.max_skipped_steps"):
        for value in ("-1", "1e3", "abc"):
            yield BadInput(f"{key}={value}", (f"{key}={value}",), key)
    for words, said in (
        (("model.kv_heads=3",), "model.kv_heads=3"),
        (("model.window=[]",), "model.window"),
        (("model.layers=2", "model.window=[8,null,16]"), "'model.window=[8,null]'"),
        (("model.layers=1", "model.rotary=[{base: 10},null]"), "layers=1, so that its end would be in no"),
        (("model.window=[0]",), "model.window"),
        (("model.window=9999999999999999999999",), "model.window"),
        (("model.dim=0",), "model.dim"),
        (("model.dim=1000000000000",), "model.dim=1000000000000: must be at most"),
        (("model.dim=16777216", "model.feed_forward_dim=16777216"), "not enough memory"),
        (("model.layers=1000000000",), "model.layers=1000000000: must be at most"),
        (("model.heads=1000000000000", "model.kv_heads=7"), "model.heads=1000000000000"),
        (("data.batch_size=1000000000000",), "data.batch_size=1000000000000"),
        (("data.sequence_length=1000000000000000", "data.batch_size=1"), "data.sequence_length"),
        (("trainer.devices=1000",), "trainer.devices=1000: at most"),
        (("data.workers=100000",), "data.workers=100000: at most"),
        (("model.rotary=[]",), "model.rotary"),
        (("model.rotary=[3]",), "model.rotary"),
        (("model.rotary=[[]]",), "model.rotary"),
        (("model.rotary=abc",), "model.rotary"),
        (("model.rotary=[{base: -1}]",), "model.rotary[0].base=-1"),
        (("model.rotary=[null,{bse: 3}]",), "model.rotary[1].bse"),
        (("model.rotary=[{base: 10000},x]",), "model.rotary"),
        (("model.rotary=[{scaling: {kind: yarn}}]",), "model.rotary[0].scaling"),
        (("model.window=[[1]]",), "model.window"),
        (("model.window=[1,x]",), "model.window"),
        (("model.attention_dropout=1",), "model.attention_dropout"),
        (("model.rotary.base=-1",), "model.rotary.base"),
        (("model.rotary.fraction=2",), "model.rotary"),
        (("model.rotary.scaling={kind: none_such}",), "model.rotary.scaling"),
        (("model.short_convolution=0",), "model.short_convolution"),
        (("model.final_logit_cap=-1",), "model.final_logit_cap"),
        (("model.final_logit_cap=1e-50",), "model.final_logit_cap"),
        (("model.final_logit_cap=1e39",), "model.final_logit_cap"),
        (("model.logit_cap=1e39",), "model.logit_cap"),
        (("model.logit_cap=1e-50",), "model.logit_cap"),
        (("evaluation.max_targets_per_document=9999999999999999999",), "evaluation.max_targets_per_document"),
        (("evaluation.max_targets=9999999999999999999",), "evaluation.max_targets"),
        (("evaluation.context_lengths=[9999999999999999999]",), "evaluation.context_lengths"),
        (
            ("evaluation.bytes_per_author=9999999999999999999", "evaluation.max_targets=null"),
            "evaluation.bytes_per_author",
        ),
        (("model.ngram_embeddings={orders: []}",), "model.ngram_embeddings"),
        (("optimizer.betas=[0.9]",), "optimizer.betas"),
        (("optimizer.betas=[0.9,1]",), "optimizer.betas"),
        (("optimizer.weight_decay=-1",), "optimizer.weight_decay"),
        (("optimizer.weight_decay=1e39",), "optimizer.weight_decay"),
        (("optimizer.embedding_weight_decay=-0.1",), "optimizer.embedding_weight_decay"),
        (("trainer.further_targets=-1",), "trainer.further_targets"),
        (("trainer.further_targets=17",), "trainer.further_targets"),
        (("trainer.further_targets_fraction=1.5",), "trainer.further_targets_fraction"),
        (("optimizer.lr=1e39",), "optimizer.lr"),
        (("optimizer.gradient_clip=0",), "optimizer.gradient_clip"),
        (("trainer.max_steps=3", "trainer.max_tokens=3"), "the budget is one of"),
        (("evaluation.context_lengths=[]",), "evaluation.context_lengths"),
        (("evaluation.context_lengths=[0]",), "evaluation.context_lengths"),
        (("evaluation.max_targets=0",), "evaluation.max_targets"),
        (("logger.project=a/b",), "logger.project"),
        (("logger.tags=[a,'']",), "logger.tags"),
        (("tokenizer.vocabulary_size=3",), "tokenizer.vocabulary_size"),
        (("tokenizer.end_mark=''",), "tokenizer.end_mark"),
    ):
        yield BadInput(" ".join(words), words, said)


def command_lines() -> Iterator[BadInput]:
    """What no command line means, and what would make a configuration run code."""
    for words, said in (
        (("model.windw=3",), "model.window"),
        (("modle=tiny",), "modle"),
        (("model=huge",), "model=huge"),
        (("=",), "key=value"),
        (("model",), "key=value"),
        (("model.window==3",), "model.window"),
        (("model.window={",), "model.window"),
        (("'",), "key=value"),
        (("\x00=1",), "cannot be read"),
        (("++",), "key=value"),
        (("--gpu",), "no such option"),
        (("--config-dir", "/tmp"), "no such option"),
        (("--experimental-rerun", "x.pickle"), "no such option"),
        (("hydra/launcher=joblib_none",), "hydra/launcher"),
        (("hydra=3",), "hydra"),
        (("hydra.verbose=3",), "hydra.verbose"),
        (("hydra.callbacks=3",), "hydra.callbacks"),
        (("+hydra.callbacks.x._target_=pathlib.Path",), "hydra.callbacks.x._target_"),
        (("hydra.launcher=3",), "hydra.launcher"),
        (("hydra.launcher._target_=os.getcwd",), "hydra.launcher._target_"),
        (("hydra.job_logging={version: 3}",), "hydra.job_logging"),
        (("hydra/job_logging=default",), "hydra/job_logging"),
        (("hydra.sweeper.params.seed=3",), "hydra.sweeper.params.seed"),
        (("hydra.job.env_set={LD_PRELOAD: x}",), "hydra.job.env_set"),
        (("+_target_=os.system",), "_target_"),
        (("+model._target_=os.system",), "_target_"),
        (("model={_target_: os.system, _args_: [touch pwned]}",), "model"),
        (("+model.rotary._target_=subprocess.run",), "_target_"),
        (("model.rotary={_target_: os.system}",), "_target_"),
        (("+optimizer._partial_=true",), "_partial_"),
        (("+tokenizer.trust_remote_code=true",), "trust_remote_code"),
        (("+data.trust_remote_code=true",), "trust_remote_code"),
        (("seed=${oc.env:HOME_OF_NOBODY}",), "HOME_OF_NOBODY"),
        (("seed=${eval:1+1}",), "seed"),
        (("seed=${seed}",), "seed"),
        (("run_dir=books/a.txt",), "run_dir"),
        (("run_dir=books",), "run_dir"),
        (("run_dir=run",), "resume"),
        (("resume=books",), "resume"),
        (("resume=nowhere",), "resume"),
        (("-m", "run_dir=books", "seed=1,2"), "run_dir"),
        (("-m", "seed=range(0,0)"), "seed=range(0,0): the sweep has no run"),
        (("-m", "seed=1,1x"), "seed"),
    ):
        yield BadInput(" ".join(words).replace("\x00", "NUL"), words, said)


def bytes_of(content: bytes, name: str) -> Make:
    return lambda folder: (folder / name).write_bytes(content)


def parquet(columns: Any, **others: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns, **others), file)
    return file.getvalue()


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def bomb(folder: Path) -> None:
    """Half a gigabyte of text in half a megabyte."""
    with gzip.open(folder / "x.txt.gz", "wb") as file:
        for _ in range(512):
            file.write(b"all the same words " * 55_000)


def parquet_bomb(folder: Path) -> None:
    """Rows of sixteen megabytes in a small file."""
    table = pa.table({"text": ["a" * (1 << 24)] * 8})
    with pq.ParquetWriter(
        folder / "x.parquet", table.schema, compression="zstd", use_dictionary=False
    ) as file:
        for _ in range(8):
            file.write_table(table)


def whole(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


LONG = "some words that are long enough " * 20
FILES: tuple[tuple[str, bytes, str], ...] = (
    ("latin1.txt", "café".encode("latin1") * 50, "not UTF-8"),
    ("utf16.txt", LONG.encode("utf-16"), "iconv -f UTF-16 -t"),
    ("utf16be.txt", b"\xfe\xff" + LONG.encode("utf-16-be"), "iconv -f UTF-16 -t"),
    ("utf32.txt", LONG.encode("utf-32"), "iconv -f UTF-32 -t"),
    ("utf16.txt.gz", packed(LONG.encode("utf-16")), "zcat utf16.txt.gz | iconv -f UTF-16 -t"),
    ("unmarked16.txt", LONG.encode("utf-16-le"), "zero bytes"),
    ("pdf.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" * 9, "it is a PDF"),
    ("book.epub", b"PK\3\4\x14\0\x08\0" + bytes(range(256)), "it is a zip archive"),
    ("unnamed", packed(LONG.encode()), "must say by .gz"),
    ("surrogate.txt", b"abc \xed\xa0\x80 def" * 20, "not UTF-8"),
    ("overlong.txt", b"abc \xc0\xaf def" * 20, "not UTF-8"),
    ("cut.txt", LONG.encode() + b"\xe2\x82", "not UTF-8"),
    ("nul.txt", b"abc\0def" * 20, "zero bytes"),
    ("image.png", bytes(range(256)) * 4, "image.png"),
    ("empty.txt", b"", "empty"),
    ("empty.jsonl", b"", "empty"),
    ("empty.parquet", b"", "empty"),
    ("blank.jsonl", b"\n\n\n", "no document holds text"),
    ("nothing.jsonl", b'{"text": ""}\n', "no document holds text"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
    ("list.jsonl", b'["a"]\n', "line 1"),
    ("number.jsonl", b"3\n", "line 1"),
    ("null.jsonl", b"null\n", "line 1"),
    ("column.jsonl", b'{"body": "a"}\n', "data.text_column"),
    ("nested.jsonl", b'{"text": {"a": "b"}}\n', "data.text_column"),
    ("listed.jsonl", b'{"text": ["a", "b"]}\n', "data.text_column"),
    ("null_row.jsonl", whole(LONG) + b'{"text": null}\n', "data.text_column"),
    ("later.jsonl", whole(LONG) + b'{"body": "a"}\n', "row 2"),
    ("utf8.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
    ("deep.jsonl", b"[" * 200_000 + b"\n", "line 1"),
    ("digits.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n", "line 1|data.text_column"),
    ("lone.jsonl", b'{"text": "' + b"\\ud800 abc " * 30 + b'"}\n', "lone.jsonl"),
    ("nul.jsonl", b'{"text": "abc"}\n{"text": "abc\\u0000def"}\n', "row 2 of 'nul.jsonl' holds zero bytes"),
    ("nan.jsonl", b'{"text": NaN}\n', "data.text_column"),
    ("cut.jsonl", whole(LONG)[:-20], "line 1"),
    ("no.txt.gz", LONG.encode(), "no whole gzip"),
    ("cut.txt.gz", packed(LONG.encode())[:-12], "no whole gzip"),
    ("flipped.txt.gz", packed(LONG.encode() * 9)[:40] + b"\xff\xff" + packed(LONG.encode() * 9)[42:], "gzip"),
    ("inner.txt.gz", packed(b"abc\0" * 40), "zero bytes"),
    ("twice.txt.gz", packed(packed(LONG.encode())), "not UTF-8"),
    ("no.jsonl.gz", b'{"text": "a"}', "no whole gzip"),
    ("no.parquet", b"PAR1 but not really PAR1", "not readable as parquet"),
    ("cut.parquet", parquet({"text": [LONG] * 9})[:-40], "not readable as parquet"),
    ("half.parquet", parquet({"text": [LONG] * 9})[:200], "not readable as parquet"),
    ("column.parquet", parquet({"body": [LONG]}), "data.text_column"),
    ("nested.parquet", parquet({"text": [{"a": LONG}]}), "data.text_column"),
    ("listed.parquet", parquet({"text": [[LONG]]}), "data.text_column"),
    ("null.parquet", parquet({"text": [None, LONG]}), "data.text_column"),
    ("number.parquet", parquet({"text": [1, 2]}), "data.text_column"),
    ("binary.parquet", parquet({"text": [b"\xff\xfe"] * 3}), "binary.parquet"),
    ("nul.parquet", parquet({"text": ["abc\0def"]}), "row 1 of 'nul.parquet' holds zero bytes"),
    (
        "twice.parquet",
        parquet([pa.array([LONG])] * 2, names=["text", "text"]),
        "2 columns of the name 'text'",
    ),
    ("rows.parquet", parquet({"text": pa.array([], pa.string())}), "no document holds text"),
    ("tiny.txt", b"a", "no document is left for the validation split"),
)


def data_files() -> Iterator[BadInput]:
    """Files that are no text, or not whole."""
    for name, content, said in FILES:
        yield BadInput(f"data {name}", (f"data.path={name}",), said, bytes_of(content, name))
    yield BadInput("data gzip bomb", ("data.path=x.txt.gz",), "x.txt.gz", bomb)
    yield BadInput("data parquet bomb", ("data.path=x.parquet",), "x.parquet", parquet_bomb)
    made: tuple[tuple[str, str, Make], ...] = (
        ("missing.txt", "no such file", lambda folder: None),
        ("gone.txt", "gone.txt", lambda folder: (folder / "gone.txt").symlink_to("nowhere")),
        ("loop.txt", "loop.txt", lambda folder: (folder / "loop.txt").symlink_to("loop.txt")),
        ("fifo.txt", "neither a file nor a folder", lambda folder: os.mkfifo(folder / "fifo.txt")),
        ("hollow", "hollow", lambda folder: (folder / "hollow").mkdir()),
        ("*.none", "no file matches", lambda folder: None),
        ("[", "no file matches", lambda folder: None),
        ("books/a.txt/b", "books/a.txt/b", lambda folder: None),
        ("n" * 300, "n" * 30, lambda folder: None),
        ("pictures", "no .txt", lambda folder: Path(shutil.copytree(folder / "books", folder / "pictures"))
         and [path.rename(path.with_suffix(".png")) for path in (folder / "pictures").iterdir()]),
    )  # fmt: skip
    for name, said, make in made:
        yield BadInput(f"data {name[:20]}", (f"data.path={name}",), said, make)
    for name, content in (
        ("no.json", b"not JSON"),
        ("text.json", b'"a"'),
        ("key.json", b'[{"name": "a"}]'),
        ("null.json", b'[{"author": null}]'),
        ("empty.json", b""),
        ("utf8.json", b'["\xff"]'),
        ("author.json", b'[{"author": "a"}]'),
    ):
        words = ("data.path=books", f"data.exclude={name}")
        yield BadInput(f"exclude {name}", words, "data.exclude", bytes_of(content, name))
    words = ("data.path=books", "data.exclude=list")
    yield BadInput("exclude pipe", words, "not a file", lambda folder: os.mkfifo(folder / "list"))
    yield BadInput("exclude folder", words, "not a file", lambda folder: (folder / "list").mkdir())
    yield BadInput("exclude missing", ("data.path=books", "data.exclude=none.json"), "data.exclude")
    yield BadInput("cache in a file", ("data.path=books", "data.cache_dir=books/a.txt"), "books/a.txt")


class Runs:
    """A pickle that would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def pickled() -> bytes:
    return pickle.dumps(Runs())


def tokenizers() -> Iterator[BadInput]:
    """Files that are no tokenizer, or one that loses text."""
    cases: tuple[tuple[str, bytes], ...] = (
        ("empty.json", b""),
        ("text.json", b"hello"),
        ("list.json", b"[]"),
        ("object.json", b"{}"),
        ("pickle.json", pickled()),
        ("half.json", b'{"version": "1.0", "model": {"type": "BPE"'),
        ("unigram.json", b'{"version":"1.0","model":{"type":"Unigram","vocab":[["a",0.0]]}}'),
        ("zeros.json", bytes(4096)),
        ("deep.json", b"[" * 100_000),
        ("module.json", b'{"model":{"type":"os.system"},"auto_map":{"AutoTokenizer":"evil.Evil"}}'),
        (
            "words.json",
            b'{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
            b'"pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{"type":"WordLevel",'
            b'"vocab":{"a":0},"unk_token":"a"}}',
        ),
    )
    for name, content in cases:
        words = ("data.path=books", "tokenizer=file", f"tokenizer.path={name}")
        yield BadInput(f"tokenizer {name}", words, name, bytes_of(content, name))
    for name, make in (
        ("missing.json", lambda folder: None),
        ("folder.json", lambda folder: (folder / "folder.json").mkdir()),
        ("../escape.json", lambda folder: None),
    ):
        words = ("data.path=books", "tokenizer=file", f"tokenizer.path={name}")
        yield BadInput(f"tokenizer {name}", words, "tokenizer.path", make)


def signed(content: bytes) -> bytes:
    """A checkpoint whose hash is right, which anybody can compute."""
    return content + b"\nsha256 " + hashlib.sha256(content).hexdigest().encode()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def change(path: str, content: bytes | Callable[[bytes], bytes]) -> Make:
    def make(folder: Path) -> None:
        target = folder / path
        before = target.read_bytes() if target.is_file() else b""
        target.write_bytes(content(before) if callable(content) else content)

    return make


def both_states(content: Callable[[bytes], bytes]) -> Make:
    def make(folder: Path) -> None:
        for name in ("last.ckpt", "previous.ckpt"):
            change(f"run/checkpoints/{name}", content)(folder)

    return make


def in_json(path: str, **values: Any) -> Make:
    return change(path, lambda before: json.dumps({**json.loads(before), **values}).encode())


Edit = Callable[[dict[str, Any]], Any]
# What somebody may have changed in a state before hashing it again.
STATES: tuple[tuple[str, Edit, str], ...] = (
    *((f"without {name}", lambda state, name=name: state.pop(name), name) for name in (
        "state_dict", "optimizer_states", "callbacks", "loops", "lr_schedulers", "DocumentDataModule",
        "pytorch-lightning_version", "windowlm", "global_step",
    )),
    *((f"{name} of a number", lambda state, name=name: state.update({name: 3}), name) for name in (
        "state_dict", "optimizer_states", "callbacks", "loops", "windowlm", "DocumentDataModule",
    )),
    ("weights of numbers", lambda state: state["state_dict"].update({"a": 3}), "state_dict.a"),
    ("callbacks of others", lambda state: state.update(callbacks={"x": 3}), "callbacks.MetricsWriter"),
    ("batches of text", lambda state: state["windowlm"].update(batches_trained="x"), "batches_trained"),
    ("no batches", lambda state: state["windowlm"].pop("batches_trained"), "batches_trained"),
    ("fewer batches", lambda state: state["windowlm"].update(batches_trained=-5), "batches_trained"),
    ("endless batches", lambda state: state["windowlm"].update(batches_trained=2**70), "batches_trained"),
    ("sums of a number", lambda state: state["windowlm"].update(train_sums=3), "train_sums"),
    ("no identities", lambda state: state["windowlm"].update(identities=3), "identities"),
    ("next batch", lambda state: state["DocumentDataModule"].update(next_batch=-3), "next_batch"),
)  # fmt: skip


def edited(edit: Edit) -> Callable[[bytes], bytes]:
    def content(before: bytes) -> bytes:
        state = torch.load(io.BytesIO(before), weights_only=True)
        edit(state)
        return signed(saved(state))

    return content


def checkpoints() -> Iterator[BadInput]:
    """Runs whose state or model is damaged, foreign, or would run code."""
    states: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
        ("empty", lambda _: b""),
        ("half", lambda before: before[: len(before) // 2]),
        ("flipped", lambda before: before[:900] + bytes([before[900] ^ 1]) + before[901:]),
        ("text", lambda _: b"hello"),
        ("pickle", lambda _: pickled()),
        ("signed pickle", lambda _: signed(pickled())),
        ("signed torch pickle", lambda _: signed(saved({"state_dict": Runs()}))),
        ("signed text", lambda _: signed(b"hello")),
        ("signed list", lambda _: signed(saved([1, 2]))),
        ("signed nothing", lambda _: signed(saved({}))),
        ("other state", lambda _: signed(saved({"windowlm": {"identities": {}}, "state_dict": {}}))),
    )
    for name, content in states:
        for words in (
            ("run_dir=run", "resume=auto", "trainer.max_steps=9"),
            ("run_dir=new", "resume=run", "trainer.max_steps=9"),
        ):
            yield BadInput(f"state {name}, {words[1]}", words, "resume", both_states(content))
    for name, edit, said in STATES:
        words = ("run_dir=run", "resume=auto", "trainer.max_steps=9")
        yield BadInput(f"state {name}", words, said, both_states(edited(edit)))
    for name, content in (
        ("empty", b""),
        ("text", b"{"),
        ("list", b"[]"),
        ("utf8", b"\xff"),
        ("deep", b"[" * 100_000),
    ):
        words = ("run_dir=run", "resume=auto", "trainer.max_steps=9")
        for file in ("run.json", "config.json"):
            yield BadInput(f"{file} {name}", words, file, change(f"run/{file}", content))
    weights = "run/model/model.safetensors"
    huge = (2**62).to_bytes(8, "little") + b"{}"
    outside = b'{"embedding.weight":{"dtype":"F32","shape":[9,9],"data_offsets":[0,99999999]}}'
    models: tuple[tuple[str, Make, str], ...] = (
        ("weights empty", change(weights, b""), "model.safetensors"),
        ("weights half", change(weights, lambda before: before[: len(before) // 2]), "model.safetensors"),
        ("weights pickle", change(weights, pickled()), "model.safetensors"),
        ("weights huge header", change(weights, huge), "model.safetensors"),
        (
            "weights outside",
            change(weights, len(outside).to_bytes(8, "little") + outside),
            "model.safetensors",
        ),
        ("weights gone", lambda folder: (folder / weights).unlink(), "model.safetensors"),
        (
            "weights a folder",
            lambda folder: ((folder / weights).unlink(), (folder / weights).mkdir()),
            "model",
        ),
        ("config empty", change("run/model/config.json", b""), "config.json"),
        ("config list", change("run/model/config.json", b"[]"), "config.json"),
        ("config deep", change("run/model/config.json", b"[" * 100_000), "config.json"),
        ("config utf8", change("run/model/config.json", b"\xff{}"), "config.json"),
        ("config format", in_json("run/model/config.json", format=99), "config.json"),
        ("config target", in_json("run/model/config.json", model={"_target_": "os.system"}), "model"),
        ("config huge", in_json("run/model/config.json", vocabulary_size=10**12), "vocabulary_size"),
        ("config code", in_json("run/model/config.json", model={"auto_map": "evil.Evil"}), "model"),
        ("tokenizer gone", lambda folder: shutil.rmtree(folder / "run/model"), "run"),
        ("tokenizer pickle", change("run/model/tokenizer_description.json", pickled()), "tokenizer"),
    )
    for name, make, said in models:
        yield BadInput(f"model {name}", ("checkpoint=run",), said, make, "evaluate")
    for words, said in (
        ((), "checkpoint"),
        (("checkpoint=nowhere",), "nowhere"),
        (("checkpoint=books",), "books"),
        (("checkpoint=",), "checkpoint"),
        (("checkpoint=run", "data.path=nowhere"), "data.path"),
        (("checkpoint=run", "evaluation.context_lengths=[100000]"), "evaluation.context_lengths"),
        (("checkpoint=run", "evaluation.split=train"), "evaluation.split"),
        (("checkpoint=run", "output_dir=books/a.txt"), "books/a.txt"),
        (("checkpoint=run", f"output_dir={'n' * 300}"), "File name too long"),
        (("checkpoint=run", "devices=0"), "devices"),
        (("checkpoint=run", "devices=1000"), "devices=1000: at most"),
        (("checkpoint=run", "device=nope"), "device=nope"),
        (("checkpoint=run", "study.measures=[none]"), "study.measures"),
        (("checkpoint=run", "data.only=none.json"), "none.json"),
        (("checkpoint=run", "evaluation.context_lengths=[64,64]"), "evaluation.context_lengths"),
        (("checkpoint=run", "model.window=3"), "model.window"),
        (("checkpoint=run", "data.path=tiny.txt"), "tiny.txt|evaluation|data.path"),
    ):
        yield BadInput(
            f"evaluate {' '.join(words)[:80]}", words, said, bytes_of(b"a", "tiny.txt"), "evaluate"
        )


def gone(*paths: str) -> Make:
    """Without these, and otherwise as it was."""

    def make(folder: Path) -> None:
        for path in paths:
            remove = shutil.rmtree if (folder / path).is_dir() else Path.unlink
            remove(folder / path)

    return make


def in_place_of(path: str, put: Callable[[Path], Any]) -> Make:
    """Something of another kind under the name of what a run has written."""

    def make(folder: Path) -> None:
        if (folder / path).exists():
            gone(path)(folder)
        put(folder / path)

    return make


def run_folders() -> Iterator[BadInput]:
    """Folders of runs from which somebody has taken something, or in which something else lies."""
    states = tuple(f"run/checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))
    stopped = in_json("run/run.json", status="stopped")
    unsaved = in_json("run/run.json", status="stopped", has_saved=None)
    none_left = "none of its checkpoints is left"
    for name, makes, said in (
        ("no states, finished", (gone(*states),), none_left),
        ("no checkpoints", (stopped, gone("run/checkpoints")), none_left),
        ("no states nor model", (stopped, gone(*states, "run/model")), none_left),
        ("model alone", (unsaved, gone(*states)), "model.init_from=run"),
        ("metrics a folder", (in_place_of("run/metrics.jsonl", Path.mkdir),), "metrics.jsonl is no file"),
        ("metrics a pipe", (in_place_of("run/metrics.jsonl", os.mkfifo),), "metrics.jsonl is no file"),
        ("record a pipe", (in_place_of("run/run.json", os.mkfifo),), "run.json is no file"),
        ("lock a folder", (in_place_of("run/.lock", Path.mkdir),), ".lock is no file"),
        ("last state a folder", (in_place_of(states[0], Path.mkdir),), "last.ckpt is no file"),
        ("checkpoints a file", (in_place_of("run/checkpoints", Path.touch),), "checkpoints is no folder"),
        ("origin a number", (gone(*states), in_json("run/run.json", origin=5)), "origin=5 must be null or a"),
        ("W&B a number", (in_json("run/run.json", wandb_id=5),), "wandb_id=5 must be null or a text of"),
        ("W&B a path", (in_json("run/run.json", wandb_id="../a"),), "text of letters, digits, - and _; mend"),
    ):

        def make(folder: Path, makes: tuple[Make, ...] = makes) -> None:
            for change_one in makes:
                change_one(folder)

        words = ("run_dir=run", "resume=auto", "trainer.max_steps=9")
        yield BadInput(f"run folder, {name}", words, said, make)


def foreign(**files: Any) -> Make:
    """A folder `foreign/` in transformers' layout, of these files."""

    def make(folder: Path) -> None:
        (folder / "foreign").mkdir()
        for name, content in {"config.json": {"model_type": "llama"}, **files}.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / "foreign" / name).write_bytes(data)

    return make


def not_finite(folder: Path) -> None:
    path = folder / "run/model/model.safetensors"
    state = load_file(path)
    state["final_norm.weight"][0] = float("nan")
    save_file(state, path)


def other_models() -> Iterator[BadInput]:
    """Models in transformers' layout that cannot be read, and runs that cannot start from a model."""

    def index(file: object) -> Make:
        content = {"model.safetensors.index.json": {"weight_map": {"lm_head.weight": file}}}
        return foreign(**content, **{"model.bin": pickled()})

    def config(**entries: Any) -> Make:
        return foreign(**{"config.json": {"model_type": "gpt2", **entries}, "model.safetensors": b"hello"})

    def adapter(folder: Path) -> None:
        config()(folder)
        entry = {"base_model_name_or_path": "../run/model", "auto_mapping": {"parent_library": "os"}}
        (folder / "foreign" / "adapter_config.json").write_text(json.dumps(entry))

    for name, make, said in (
        ("no weights", foreign(), "neither model.safetensors nor"),
        ("pickled weights", foreign(**{"pytorch_model.bin": pickled()}), "neither model.safetensors nor"),
        ("missing shard", index("model-2.safetensors"), "model-2.safetensors: one of 1 shards is missing"),
        ("shard above", index("../run/model/model.safetensors"), "no safetensors file beside it"),
        ("shard anywhere", index("/etc/passwd"), "no safetensors file beside it"),
        ("shard in a pickle", index("model.bin"), "no safetensors file beside it"),
        ("shard of another kind", index(3), "not an index"),
        ("kernel of the hub", config(attn_implementation="evil/kernel"), "attn_implementation=evil/kernel"),
        (
            "kernel of a part",
            config(text_config={"_attn_implementation": {"": "evil/kernel:f"}}),
            "evil/kernel",
        ),
        ("kernel of experts", config(experts_implementation="evil/kernel"), "experts_implementation"),
        ("weights of another name", config(transformers_weights="../x.bin"), "transformers_weights"),
        ("quantisation", config(quantization_config={"quant_method": "torchao"}), "quantization_config"),
        ("adapter of another model", adapter, "adapter_config.json"),
        ("list for an index", foreign(**{"model.safetensors.index.json": [1]}), "not an index"),
        ("text for weights", foreign(**{"model.safetensors": b"hello"}), "model.safetensors"),
        (
            "code of its own",
            foreign(
                **{
                    "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
                    "evil.py": b"open('pwned', 'w')",
                    "model.safetensors": b"hello",
                }
            ),
            "transformers cannot open it",
        ),
        ("weights that are not finite", not_finite, "final_norm.weight holds NaN"),
    ):
        where = "run" if make is not_finite else "foreign"
        yield BadInput(f"other model {name}", (f"checkpoint={where}",), said, make, "evaluate")
    for words, said in (
        (("model.init_from=nowhere",), "model.init_from=nowhere: there is no such folder"),
        (("model.init_from=books",), "model.init_from=books: "),
        (("model.init_from=",), "model.init_from"),
        (("model.init_from=run", "model.dim=48"), "model.dim=48: model.init_from=run has model.dim=32"),
        (("model.init_from=run", "model.qkv_bias=true"), "model.qkv_bias=true"),
        (
            ("model.init_from=run", "model=small"),
            "leave them away, and what chooses or sets them (model=...)",
        ),
        (("tokenizer=folder", "tokenizer.path=books"), "tokenizer.path=books"),
        (("tokenizer=folder",), "tokenizer.path"),
        (("model.qk_norm_epsilon=0",), "model.qk_norm_epsilon"),
    ):
        yield BadInput(" ".join(words), words, said)


def results() -> Iterator[BadInput]:
    """Folders whose results cannot be compared."""
    result = "run/evaluation/length.json"
    for name, content in (
        ("empty", b""),
        ("text", b"hello"),
        ("list", b"[]"),
        ("object", b"{}"),
        ("utf8", b"\xff"),
        ("deep", b"[" * 100_000),
        ("rows", b'{"format": 1, "rows": 3, "documents": 3}'),
        ("cells", b'{"format": 1, "rows": [3], "documents": [3]}'),
    ):
        yield BadInput(
            f"result {name}", ("run", "run"), "length.json", change(result, content), "compare_runs"
        )
    for words in (("run",), ("books",), ("nowhere",), ("books/a.txt",), ("run", "books"), ("run", "nowhere")):
        yield BadInput(f"compare {' '.join(words)}", words, words[-1], command="compare_runs")


def in_result(change_of: Callable[[Any], Any]) -> Make:
    def changed(before: bytes) -> bytes:
        content = json.loads(before)
        change_of(content)
        return json.dumps(content).encode()

    return change("run/evaluation/length.json", changed)


CLUSTER = {
    "distance_from": 256, "distance_to": None, "distance": 256, "span": "random", "cluster": "a", "bytes": 5,
    "questions": 2, "right": 1.0, "saved": 1.0, "chooser": "b", "nats": {"8": 1.0},
}  # fmt: skip
# A measure and what is wrong with its file, or with an author's row in it.
MEASURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("far_repeats", {"clusters": None}),
    ("far_repeats", {"clusters": ["x"]}),
    ("far_repeats", {"rows": ["x"]}),
    ("far_repeats", {"rows": None}),
    ("far_repeats", {"rows": [{"context_length": 8, "bytes": 3, "nats": math.nan}]}),
    ("far_repeats", {"rows": [{"context_length": "8", "bytes": 3, "nats": 1.0}]}),
    ("far_repeats", {"settings": None}),
    ("far_repeats", {"meaning": ["\ud800"]}),
    *(
        (measure, {"clusters": [{**CLUSTER, **values}]})
        for measure, values in (
            ("far_repeats", {"nats": {"8": math.inf}}),
            ("far_repeats", {"nats": {"x": 1.0}}),
            ("far_repeats", {"nats": {}}),
            ("far_repeats", {"nats": 3}),
            ("far_repeats", {"bytes": 0}),
            ("far_repeats", {"cluster": [1]}),
            ("far_repeats", {"distance_to": "far"}),
            ("key_words", {"chooser": None}),
            ("pasted_spans", {"saved": math.nan}),
            ("pasted_spans", {"span": 3}),
            ("forced_choice", {"questions": 0}),
            ("forced_choice", {"right": None}),
            ("far_context", {"cluster": None}),
        )
    ),
)


def measured(measure: str, values: dict[str, Any]) -> Make:
    content = {"format": 1, "measure": measure, "meaning": [], "settings": {}, "left_out": [], "rows": [],
               "clusters": [], **values}  # fmt: skip

    def make(folder: Path) -> None:
        path = folder / "run" / "evaluation" / "study" / f"{measure}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(content))

    return make


def in_shape(**values: Any) -> Make:
    """Other entries in the shape of the run's model."""

    def changed(before: bytes) -> bytes:
        content = json.loads(before)
        return json.dumps({**content, "model": {**content["model"], **values}}).encode()

    return change("run/model/config.json", changed)


def without(path: str) -> Make:
    return lambda folder: shutil.rmtree(folder / path)


def replay_of(content: bytes) -> Make:
    def make(folder: Path) -> None:
        (folder / "run" / "replay").mkdir()
        (folder / "run" / "replay" / "step_1.ckpt").write_bytes(content)

    return make


def generated() -> Iterator[BadInput]:
    """Prompts and samplings that cannot be, and models of another shape than their weights."""
    for name, content, said in (
        ("empty", b"", "holds no prompts"),
        ("broken", b'{"prompt": "a"}\n{"prompt"', "line 2"),
        ("deep", b"[" * 100_000, "line 1"),
        ("number", b'{"prompt": 3}\n', "line 1"),
        ("no prompt", b'{"text": "a"}\n', "line 1"),
        ("lone", b'{"prompt": "\\ud800"}\n', "line 1"),
        ("utf16", "{}".encode("utf-16"), "no UTF-8 text"),
    ):
        words = ("checkpoint=run", "prompts_file=x.jsonl")
        yield BadInput(f"prompts {name}", words, said, bytes_of(content, "x.jsonl"), "generate")
    for word, said in (
        ("prompt_file=none.txt", "prompt_file=none.txt"),
        ("prompt_file=books", "prompt_file=books"),
        ("prompts_file=books", "prompts_file=books"),
        ("prompt_file=latin1.txt", "latin1.txt: no UTF-8 text"),
        (os.fsdecode(b"prompt=\xff"), "UTF-8"),
    ):
        make = bytes_of("caf\xe9".encode("latin1"), "latin1.txt")
        yield BadInput(f"generate {word!r}", ("checkpoint=run", word), said, make, "generate")
    for word in (
        "temperature=-1",
        "temperature=nan",
        "top_p=2",
        "top_k=0",
        "min_p=-1",
        "repetition_penalty=0",
        "repetition_penalty=1e-50",
        "repetition_window=5",
        "max_new_tokens=0",
        "max_new_tokens=99999999999999999999999",
        "device=tpu",
        "device=cuda:99",
        "stop=['']",
        "stop=3",
        "batch_size=0",
        "precision=16-mixed",
        "seed=-1",
        "seed=99999999999999999999999",
        "checkpoint=",
    ):
        words = ("checkpoint=run", "prompt=abc", word)
        yield BadInput(f"generate {word}", words, word.partition("=")[0], command="generate")
    for name, make, said in (
        ("no tokens", in_json("run/model/config.json", sequence_length=-5), "sequence_length=-5"),
        ("endless", in_json("run/model/config.json", sequence_length=10**30), "sequence_length=1"),
        ("rotary text", in_shape(rotary={"base": "x"}), "model.rotary"),
        ("rotary empty", in_shape(rotary=[]), "model.rotary|rotary="),
        ("rotary number", in_shape(rotary=[3]), "model.rotary"),
        ("window text", in_shape(window="a"), "model.window"),
        ("wide", in_shape(dim=10**7), "has shape"),
        ("deep", in_shape(layers=5000), "the weights of 1 layers and config.json asks for 5000"),
        ("no layers", in_shape(layers=-1), "layers=-1"),
        ("three heads", in_shape(heads=3), "has shape|heads"),
        ("fed", in_shape(feed_forward_dim=10**7), "has shape"),
        ("backend", in_shape(backend="none"), "model.backend"),
        ("buckets", in_shape(ngram_embeddings={"orders": [2], "buckets": 10**15}), "buckets|tensor"),
    ):
        yield BadInput(f"shape {name}", ("checkpoint=run", "prompt=a"), said, make, "generate")


def exported() -> Iterator[BadInput]:
    """Exports of nothing and to nowhere."""
    for words, said in (
        (("checkpoint=run", "to=onnx", "out=new"), "to=onnx"),
        (("checkpoint=run", "to=transformers", "out=books"), "out=books"),
        (("checkpoint=run", "to=transformers", "out=books/a.txt"), "out=books/a.txt"),
        (("checkpoint=run", "to=transformers", "out=books/a.txt/x"), "books/a.txt"),
        (("checkpoint=run", "to=transformers", f"out={'n' * 300}"), "cannot be written"),
        (("checkpoint=run", "to=transformers"), "out"),
        (("checkpoint=nowhere", "to=transformers", "out=new"), "checkpoint=nowhere"),
        (("checkpoint=books", "to=transformers", "out=new"), "checkpoint=books"),
    ):
        yield BadInput(f"export {' '.join(words)[:80]}", words, said, command="export")


BATCH = ("tokens_BT", "targets_BT", "documents_BT", "positions_BT")


def commands() -> Iterator[BadInput]:
    """What scripts beside those of Hydra cannot take, said before their work."""
    whole = {
        "format": 2, "step": 1, "later_steps": 0, "first_batch": 0, "learning_rate": 1.0, "seed": 0,
        "window_limit": None, "batches": [dict.fromkeys(BATCH, torch.ones(1, 4, dtype=torch.int64))],
        "vocabulary_size": 256, "model": {},
    }  # fmt: skip
    of_batch = dict.fromkeys(BATCH, torch.full((1, 4), 256))
    replay = "run/replay/step_1.ckpt"
    for name, value, said in (
        ("pickle", pickled(), "step_1.ckpt"),
        ("torn", signed(saved({"format": 2})), "its step is missing"),
        ("of an earlier version", signed(saved({**whole, "format": 1})), "is no replay of this version"),
        ("without windows", signed(saved({**whole, "window_limit": 0})), "its window_limit is 0"),
        ("list", signed(saved([1])), "is no replay"),
        ("of nothing", signed(saved(whole)), "Missing key"),
        ("batch", signed(saved({**whole, "batches": [{"tokens_BT": 3}]})), "a batch lacks"),
        ("no batch", signed(saved({**whole, "batches": []})), "its batches 0"),
        ("no vocabulary", signed(saved({**whole, "vocabulary_size": -1})), "its vocabulary_size is -1"),
        ("tokens", signed(saved({**whole, "batches": [of_batch]})), "a token of a batch is none of the 256"),
        (
            "lists",
            signed(saved({**whole, "batches": [{name: [1] for name in BATCH}]})),
            "no whole numbers of rows",
        ),
    ):
        yield BadInput(f"replay {name}", (replay,), said, replay_of(value), "replay_batch")
    for words, said in (
        (("nowhere",), "nowhere"),
        (("run/checkpoints/last.ckpt",), "is no replay"),
        (("run/checkpoints/last.ckpt", "--device", "nope"), "device=nope"),
    ):
        yield BadInput(f"replay {' '.join(words)}", words, said, command="replay_batch")
    for part in ("run/checkpoints", "run/model", "run/evaluation"):
        yield BadInput(f"reproduce without {part}", ("run",), "is gone", without(part), "reproduce")
    for path, content in (("config.json", b"[" * 100_000), ("run.json", b"{")):
        yield BadInput(f"reproduce {path}", ("run",), path, change(f"run/{path}", content), "reproduce")
    for count, said in ((1000, "was made by 1000 processes"), ("two", "a number from 1 on"), (True, "=true")):
        make = in_json("run/run.json", processes=count)
        yield BadInput(f"reproduce with {count} processes", ("run",), said, make, "reproduce")
    for path in ("nowhere", "books"):
        yield BadInput(f"reproduce {path}", (path,), path, command="reproduce")
    for content in (b"[1]", b"[" * 100_000):
        make_record = bytes_of(content, "run/scored.json")
        yield BadInput(f"scored {content[:3]!r}", (".",), "scored.json", make_record, "score_runs")
    for words, said in (
        (("pack", "nowhere", "out"), "nowhere"),
        (("pack", "books", "out"), "holds no finished run"),
        (("pack", ".", "books/a.txt"), "books/a.txt"),
        (("pack", ".", "out", "--part-mebibytes", "0.5"), "try 15"),
        (("pack", ".", "out", "--losses", "nowhere/*"), "nowhere/*"),
        (("unpack", "books", "there"), "holds no runs.arrow.gz"),
        (("unpack", "nowhere", "there"), "nowhere"),
    ):
        yield BadInput(f"packed {' '.join(words)}", words, said, command="pack_runs")
    for words in ((".", "--seconds", "nan"), (".", "--seconds", "0"), (".", "words"), ("nowhere",)):
        yield BadInput(f"score {' '.join(words)}", words, words[-2] if "--seconds" in words else words[-1],
                       command="score_runs")  # fmt: skip
    rows: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("text", lambda content: content["rows"][0].update(bits_per_byte="a")),
        ("nothing", lambda content: content["rows"][0].update(nats=None)),
        ("without length", lambda content: content["rows"][0].pop("context_length")),
        ("documents", lambda content: content.update(documents=[])),
        ("format", lambda content: content.update(format=99)),
        ("document", lambda content: content["documents"][0].update(nats={"16": "a"})),
        ("not a number", lambda content: content["rows"][0].update(nats=math.nan)),
        ("endless", lambda content: content["rows"][-1].update(bits_per_byte=math.inf)),
        ("of many digits", lambda content: content["rows"][0].update(nats=10**400)),
        ("true", lambda content: content["rows"][0].update(perplexity=True)),
        ("negative length", lambda content: content["rows"][0].update(context_length=-1)),
        ("other length", lambda content: content["rows"][0].update(context_length=3)),
        ("author", lambda content: content["documents"][0].update(author=[1])),
        ("half a character", lambda content: content["documents"][0].update(author="\ud800")),
        ("without bytes", lambda content: content["documents"][0].update(bytes=0)),
        ("cluster", lambda content: content.update(cluster=[])),
        ("parameters", lambda content: content.update(parameters="many")),
        ("hash", lambda content: content.update(targets_hash=[1])),
    )
    for name, edit in rows:
        yield BadInput(f"cell {name}", ("run", "run"), "length.json", in_result(edit), "compare_runs")
    for measure, values in MEASURES:
        make = measured(measure, values)
        said = f"{measure}.json: damaged, or not a measure"
        yield BadInput(f"measure {measure} {values}", ("run", "run"), said, make, "compare_runs")
    for script in ("compare_runs", "compare_settings", "ablation_table"):
        make_half = change("run/config.json", b'{"model": {"dim": "\\ud800"}}')
        yield BadInput(f"{script} of half a character", (".",), "run/config.json", make_half, script)
        make_list = change("run/config.json", b"[]")
        yield BadInput(f"{script} of no settings", (".",), "run/config.json", make_list, script)
    for script in ("compare_settings", "ablation_table"):
        for path in ("nowhere", "books"):
            yield BadInput(f"{script} {path}", (path,), path, command=script)
    study = ("length_study", (".", "--evaluation", "evaluation", "--out", "books/a.txt"), "books/a.txt")
    words_of: tuple[tuple[str, tuple[str, ...], str], ...] = (
        study,
        ("length_study", (".",), "--evaluation"),
        ("compare_runs", ("run", "run", "--evaluation", "a/b"), "--evaluation"),
        ("show_attention", ("window=0",), "window"),
        ("show_attention", ("documents=[5,8]", "sequence_length=12"), "documents"),
        ("show_attention", ("output_file=none/x.png",), "output_file"),
        ("show_attention", ("sequence_length=1000000000",), "sequence_length"),
        ("harness_task", ("run", "none.txt", "32", "new"), "none.txt"),
        ("harness_task", ("run", "books/a.txt", "0", "new"), "CONTEXT_LENGTH"),
        ("harness_task", ("run", "books/a.txt", "32", "new"), "scripts/export.py checkpoint=run"),
        ("benchmark_attention", ("--rounds", "0"), "--rounds"),
        ("benchmark_attention", ("--shapes", "Z"), "--shapes"),
        ("benchmark_attention", ("--out", "books/a.txt"), "books/a.txt"),
        ("benchmark_layer", ("--layers", "0"), "--layers"),
        ("benchmark_decoding", ("--tokens", "0"), "--tokens"),
        ("benchmark_decoding", ("--out", "books/a.txt"), "books/a.txt"),
        ("benchmark_training", ("--shape", "abc"), "--shape"),
        ("benchmark_training", ("--out", "books/a.txt"), "books/a.txt"),
        ("measure_streaming", ("--chunk", "0"), "--chunk"),
        ("measure_streaming", ("--greedy", "0"), "--greedy"),
        ("measure_streaming", ("--checkpoint", "nowhere"), "nowhere"),
        ("measure_streaming", ("--out", "books/a.txt"), "books/a.txt"),
        ("measure_parity", ("--out", "books/a.txt/x"), "books/a.txt"),
        ("prove_evaluator", ("--out", "books/a.txt/x"), "books/a.txt"),
        ("interval_coverage", ("--simulations", "0"), "--simulations"),
        ("compare_precisions", ("--steps", "9"), "--steps"),
        ("compare_precisions", ("small",), "small"),
        ("compare_precisions", ("--out", "books/a.txt/x"), "books/a.txt"),
        ("interval_coverage", ("--out", "books/a.txt/x"), "books/a.txt"),
        ("measure_stops", ("--repeats", "0"), "--repeats"),
        ("soak", ("--steps", "0"), "--steps"),
        ("soak", ("--settle", "100000"), "--settle"),
        ("kill_and_resume", ("--cases", "abc"), "--cases abc"),
        ("kill_and_resume", ("--cases", "adamw,32,0,none"), "--cases adamw,32,0,none"),
        ("kill_and_resume", ("--kills", "-1"), "--kills"),
        ("kill_and_resume", ("--first", "validation@0"), "--first validation@0"),
        ("kill_and_resume", ("--out", "books/a.txt"), "books/a.txt"),
    )
    for script, words, said in words_of:
        yield BadInput(f"{script} {' '.join(words)}", words, said, command=script)


def permissions() -> Iterator[BadInput]:
    """Files and folders that this account may not read or enter."""
    denied = "cannot be read: Permission denied"
    budget = "trainer.max_steps=9"
    for command, words, path, said in (
        ("train", ("run_dir=run", "resume=auto", budget), "run/checkpoints", "last.ckpt: Permission denied"),
        (
            "train",
            ("run_dir=run", "resume=auto", budget),
            "run/checkpoints/last.ckpt",
            f"last.ckpt: {denied}",
        ),
        ("train", ("run_dir=run", "resume=auto", budget), "run/run.json", "run.json cannot be read"),
        ("train", ("run_dir=new", "resume=run", budget), "run/checkpoints", f"resume=run: {denied}"),
        ("train", ("run_dir=shut/run",), "shut", f"run_dir=shut/run: {denied}"),
        ("train", ("resume=shut/run",), "shut", f"resume=shut/run: {denied}"),
        ("train", ("model.init_from=shut/run",), "shut", f"model.init_from=shut/run: {denied}"),
        ("train", ("data.path=shut/x.txt",), "shut", "data.path='shut/x.txt': not readable: Permission"),
        (
            "train",
            ("tokenizer=file", "tokenizer.path=shut/x.json"),
            "shut",
            f"tokenizer.path=shut/x.json: {denied}",
        ),
        ("train", ("tokenizer=folder", "tokenizer.path=shut/x"), "shut", f"tokenizer.path=shut/x: {denied}"),
        (
            "evaluate",
            ("checkpoint=shut/run",),
            "shut",
            f"checkpoint=shut/run: {denied}",
        ),
        ("evaluate", ("checkpoint=run",), "run/model/model.safetensors", "Permission denied"),
        ("generate", ("checkpoint=shut/run", "prompt=a"), "shut", f"checkpoint=shut/run: {denied}"),
        ("compare_runs", ("shut",), "shut", "shut/run.json: Permission denied"),
        ("reproduce", ("shut/run",), "shut", "shut/run/run.json: Permission denied"),
        ("replay_batch", ("shut/step_1.ckpt",), "shut", f"shut/step_1.ckpt: {denied}"),
    ):

        def make(folder: Path) -> None:
            (folder / "shut").mkdir()

        yield BadInput(f"{path} is locked, {' '.join(words)}", words, said, make, command, (path,))


def bad_inputs() -> list[BadInput]:
    """All of them."""
    kinds = (
        settings, command_lines, data_files, tokenizers, checkpoints, run_folders, other_models, results,
        generated, exported, commands, permissions,
    )  # fmt: skip
    return [entry for kind in kinds for entry in kind()]


if __name__ == "__main__":
    print(len(bad_inputs()), file=sys.stderr)
