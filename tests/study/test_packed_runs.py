"""Results of finished runs go to another folder and lose nothing that a study needs."""

import contextlib
import gzip
import io
import json
import os
import random
import runpy
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest

from windowlm.errors import UserError
from windowlm.study import packed_runs
from windowlm.study.packed_runs import pack_runs, unpack_runs

SCRIPT = Path(__file__).parents[2] / "scripts" / "pack_runs.py"
RESULTS = {
    "run.json": '{"status": "finished"}',
    "config.json": "{}",
    "metrics.jsonl": '{"step": 1}\n',
    ".hydra/overrides.yaml": "[]",
    "model/config.json": "{}",
    "evaluation/length.json": "{}",
    "evaluation_train/study/reach.json": "{}",
    "scored.json": '[["a=1"]]',
}
LEFT_OUT = {
    ".lock": "",
    "model/model.safetensors": "weights",
    "checkpoints/last.ckpt": "state",
    "evaluation_train/unfinished/1.npz": "piece",
    "evaluation/.length.json.partial-1": "x",
}
LOSSES = "evaluation/losses.parquet"


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def files_in(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    for name in ("main/0", "main/1"):
        write(folder / name, {**RESULTS, **LEFT_OUT, LOSSES: name})
    write(folder / "main" / "2", {**RESULTS, "run.json": '{"status": "stopped"}'})
    return folder


def test_finished_runs_arrive_without_weights_states_and_losses(runs, tmp_path):
    count, parts = pack_runs(runs, tmp_path / "packed", 1 << 20)
    assert (count, [part.name for part in parts]) == (2, ["runs.arrow.gz.1-of-1"])
    found = unpack_runs(tmp_path / "packed", tmp_path / "there")
    assert (found.runs, found.written, found.kept) == (2, 2 * len(RESULTS), [])
    expected = {f"main/{number}/{name}": text for number in "01" for name, text in RESULTS.items()}
    assert files_in(tmp_path / "there") == expected
    again = unpack_runs(tmp_path / "packed", tmp_path / "there")
    assert (again.written, again.kept) == (0, [])


def test_what_goes_on_elsewhere_is_added_and_nothing_is_overwritten(runs, tmp_path):
    pack_runs(runs, tmp_path / "packed", 1 << 20)
    there = tmp_path / "there"
    write(
        there,
        {
            "main/0/scored.json": '[["b=2"]]',
            "main/0/run.json": RESULTS["run.json"],
            "main/0/config.json": "x",
        },
    )
    found = unpack_runs(tmp_path / "packed", there)
    assert found.kept == ["main/0/config.json"]
    assert (there / "main" / "0" / "config.json").read_text() == "x"
    assert json.loads((there / "main" / "0" / "scored.json").read_text()) == [["b=2"], ["a=1"]]
    (there / "main" / "1" / "run.json").write_text('{"status": "running"}')
    before = files_in(there)
    with pytest.raises(UserError, match=r"main/1: is another run than that of the archive, or not finished"):
        unpack_runs(tmp_path / "packed", there)
    assert files_in(there) == before


def test_pages_and_pictures_may_be_left_out(runs, tmp_path):
    write(runs / "main" / "0", {"evaluation/report.html": "page", "evaluation/length.png": "picture"})
    pack_runs(runs, tmp_path / "packed", 1 << 20)
    unpack_runs(tmp_path / "packed", tmp_path / "there")
    pack_runs(runs, tmp_path / "packed", 1 << 20, numbers=True)
    unpack_runs(tmp_path / "packed", tmp_path / "elsewhere")
    missing = {f"main/0/evaluation/{name}" for name in ("report.html", "length.png")}
    assert files_in(tmp_path / "there").keys() - files_in(tmp_path / "elsewhere").keys() == missing


def test_losses_are_packed_by_themselves_for_the_runs_that_are_named(runs, tmp_path):
    assert pack_runs(runs, tmp_path / "packed", 1 << 20, losses_of="main/[1-9]")[0] == 1
    unpack_runs(tmp_path / "packed", tmp_path / "there")
    assert files_in(tmp_path / "there") == {f"main/1/{LOSSES}": "main/1"}
    with pytest.raises(UserError, match=r"no finished run with losses\.parquet whose name is like x"):
        pack_runs(runs, tmp_path / "packed", 1 << 20, losses_of="x")


def test_parts_are_no_larger_than_asked_for_and_all_are_needed(runs, tmp_path):
    packed = tmp_path / "packed"
    _, parts = pack_runs(runs, packed, 100)
    assert len(parts) > 3
    assert max(part.stat().st_size for part in parts) <= 100
    unpack_runs(packed, tmp_path / "there")
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[::-1])
    with pytest.raises(UserError, match=r"damaged .*nothing was written"):
        unpack_runs(packed, tmp_path / "elsewhere")
    parts[1].unlink()
    with pytest.raises(UserError, match=r"runs\.arrow\.gz\.2-of-\d+ is missing"):
        unpack_runs(packed, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()
    pack_runs(runs, packed, 1 << 20)
    assert [path.name for path in packed.iterdir()] == ["runs.arrow.gz.1-of-1"]


def test_an_archive_writes_nowhere_else(runs, tmp_path, monkeypatch):
    archive = packed_runs._archive
    monkeypatch.setattr(
        packed_runs,
        "_archive",
        lambda files, **options: archive({f"../{name}": data for name, data in files.items()}, **options),
    )
    pack_runs(runs, tmp_path / "packed", 1 << 20)
    with pytest.raises(UserError, match=r"\.\./main/0/.* is no file of a run.*nothing was written"):
        unpack_runs(tmp_path / "packed", tmp_path / "in" / "there")
    assert not (tmp_path / "in").exists()


RUN = {"r1/run.json": b"{}"}


def written_by_hand(folder, files, part="1-of-1"):
    folder.mkdir()
    (folder / f"runs.arrow.gz.{part}").write_bytes(packed_runs._archive(files, compression=1))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("r1/a\0.json",),
        ("./r1/run.json",),
        (".",),
        ("",),
        ("r1",),
        ("r1/a.json", "r1/a.json/b.json"),
        ("r1//a.json",),
        ("r1/./a.json",),
        ("r1/../a.json",),
        ("/r1/a.json",),
        ("r1\\a.json",),
        ("r1/" + "n" * 300 + ".json",),
        ("other/config.json",),
        ("r1/torch.py",),
        ("r1/sitecustomize.pyc",),
        ("r1/model/model.safetensors",),
        ("r1/.json",),
    ],
)
def test_an_archive_of_other_names_than_those_of_runs_is_refused_before_anything_is_written(tmp_path, names):
    packed = written_by_hand(
        tmp_path / "packed", {**RUN, "r1/config.json": b"{}", **dict.fromkeys(names, b"1")}
    )
    with pytest.raises(UserError, match=r"is no file of a run.*nothing was written"):
        unpack_runs(packed, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    "columns", [(["r1/run.json"], [None]), ([None], [b"1"]), (["r1/run.json"] * 2, [b"1"] * 2)]
)
def test_an_archive_without_names_or_contents_or_with_one_twice_is_damaged(tmp_path, columns):
    stream = io.BytesIO()
    table = pyarrow.table(dict(zip(("name", "content"), columns, strict=True)), packed_runs._schema())
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "runs.arrow.gz.1-of-1").write_bytes(gzip.compress(stream.getvalue()))
    with pytest.raises(
        UserError, match=r"damaged \(a name or a content is missing, or a name is there twice"
    ):
        unpack_runs(tmp_path, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_settings_of_scores_are_read_before_anything_is_written(tmp_path):
    packed = written_by_hand(tmp_path / "packed", {**RUN, "r1/a.json": b"", "r1/scored.json": b"{"})
    with pytest.raises(UserError, match=r"scored\.json: damaged"):
        unpack_runs(packed, tmp_path / "there")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("name", ["a\\b", os.fsdecode(b"a\xff")])
def test_a_run_whose_name_could_not_be_unpacked_is_not_packed(tmp_path, name):
    write(tmp_path / "runs" / name, RESULTS)
    with pytest.raises(UserError, match="holds a backslash or is no UTF-8; give it another name"):
        pack_runs(tmp_path / "runs", tmp_path / "packed", 1 << 20)
    assert not (tmp_path / "packed").exists()


def test_parts_are_not_counted_to_the_number_that_a_name_tells(tmp_path):
    packed = written_by_hand(tmp_path / "packed", RUN, "1-of-99999999999")
    with pytest.raises(UserError, match=r"runs\.arrow\.gz\.2-of-99999999999 is missing"):
        unpack_runs(packed, tmp_path / "there")


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused_before_it_fills_memory(runs, tmp_path):
    _, (part,) = pack_runs(runs, tmp_path / "packed", 1 << 20)
    good = gzip.decompress(part.read_bytes())
    part.write_bytes(gzip.compress(good + bytes(100 << 20), mtime=0))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"more than 200 times its size.*nothing was written"):
        unpack_runs(tmp_path / "packed", tmp_path / "there")
    # 64 MiB are always allowed, and zlib grows what it writes to.
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()
    part.write_bytes(gzip.compress(good, mtime=0)[:-9])
    with pytest.raises(UserError, match="its end is missing"):
        unpack_runs(tmp_path / "packed", tmp_path / "there")
    # One content of a dictionary, named a thousand times.
    content = pyarrow.array([b"x"] * 1000, pyarrow.large_binary()).dictionary_encode()
    table = pyarrow.table({"name": [f"main/{number}/x" for number in range(1000)], "content": content})
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    part.write_bytes(gzip.compress(stream.getvalue()))
    with pytest.raises(UserError, match="other columns"):
        unpack_runs(tmp_path / "packed", tmp_path / "there")
    table = pyarrow.ipc.open_stream(good).read_all()
    for codec in ("zstd", "lz4"):
        stream = io.BytesIO()
        options = pyarrow.ipc.IpcWriteOptions(compression=codec)
        with pyarrow.ipc.new_stream(stream, table.schema, options=options) as writer:
            writer.write_table(table)
        part.write_bytes(gzip.compress(stream.getvalue()))
        with pytest.raises(UserError, match="compressed once more"):
            unpack_runs(tmp_path / "packed", tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_an_archive_that_is_damaged_inside_is_refused_or_whole(runs, tmp_path):
    # Its own checksum right: bytes of somebody who writes archives by hand.
    _, (part,) = pack_runs(runs, tmp_path / "packed", 1 << 20)
    good, draw = gzip.decompress(part.read_bytes()), random.Random(0)
    for number in range(200):
        damaged = bytearray(good)
        for _ in range(draw.choice([1, 2, 5])):
            # Near its ends is what describes the content.
            place = draw.choice([draw.randrange(600), -1 - draw.randrange(600)])
            damaged[place] = draw.randrange(256)
        part.write_bytes(gzip.compress(damaged, 1))
        with contextlib.suppress(UserError):
            unpack_runs(tmp_path / "packed", tmp_path / "there" / str(number))


def test_the_command_packs_unpacks_and_names_a_mistake(runs, tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["pack_runs.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code

    assert call("pack", runs, tmp_path / "out") == 0
    assert "2 finished runs in" in capsys.readouterr().out
    assert call("unpack", tmp_path / "out", tmp_path / "there") == 0
    assert "2 runs in the archive; 16 files written" in capsys.readouterr().out
    for words, message in (
        (("pack", tmp_path / "none", tmp_path / "out"), "there is no such folder"),
        (("pack", runs, tmp_path / "out", "--part-mebibytes", "0"), "from 1 on"),
        (("unpack", tmp_path / "there", tmp_path / "out"), r"holds no runs.arrow.gz.1-of-N"),
    ):
        assert call(*words) == 2
        assert message in capsys.readouterr().err
