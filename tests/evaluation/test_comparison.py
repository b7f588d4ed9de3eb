"""Runs side by side."""

import json
import math
import shlex

import pytest

from windowlm.errors import UserError
from windowlm.evaluation.comparison import differing_settings, paired_lengths, read_run, runs_in
from windowlm.evaluation.config import EvaluationConfig
from windowlm.evaluation.length_sweep import length_sweep
from windowlm.evaluation.result_files import write_results

from .fakes import ReachModel, one_byte_each, random_documents
from .test_length_sweep import FACTS


def make_run(folder, settings, *, reach=6, lengths=(4, 8), seed=0, ended=True, authors=None, **facts):
    """A run's folder as training leaves it, its model a fake one."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    (folder / "config.json").write_text(
        json.dumps({**settings, "run_dir": str(folder), "logger": {"name": str(folder)}})
    )
    if ended:
        documents = random_documents([60, 40, 50], seed=seed, authors=authors)
        evaluation = EvaluationConfig(context_lengths=list(lengths))
        model = ReachModel(11, reach=reach)
        swept = length_sweep(model, documents, one_byte_each(), evaluation, {**FACTS, **facts})
        write_results(folder / "evaluation", *swept, {"length.png": b"plot"})
    return read_run(folder)


def settings_of(window, kv_heads=1):
    return {"model": {"window": window, "kv_heads": kv_heads}, "precision": "32-true"}


def test_runs_are_found_in_numeric_order_with_those_that_have_not_ended(tmp_path):
    for number in (10, 2, 0):
        make_run(tmp_path / "sweep" / str(number), settings_of(number + 1), ended=number != 2)
    (tmp_path / "sweep" / "multirun.yaml").write_text("")
    runs = runs_in(tmp_path)
    assert [run.folder.name for run in runs] == ["0", "2", "10"]
    assert [run.result is None for run in runs] == [False, True, False]


def test_settings_that_differ_are_named_by_their_full_keys(tmp_path):
    runs = [
        make_run(tmp_path / "a", settings_of(64), ended=False),
        make_run(tmp_path / "b", settings_of([64, None]), ended=False),
        make_run(tmp_path / "c", {**settings_of(64), "seed": 1}, ended=False),
    ]
    assert differing_settings(runs) == ["model.window", "seed"]
    assert differing_settings(runs[:1]) == []


def test_a_list_in_the_place_of_a_group_differs_from_the_group(tmp_path):
    pattern = [{"base": 10_000.0, "fraction": 1.0, "scaling": None}, None]
    runs = [
        make_run(tmp_path / name, {"model": {"rotary": rotary}}, ended=False)
        for name, rotary in (("a", pattern), ("b", pattern[0]), ("c", pattern), ("d", None))
    ]
    assert differing_settings([runs[0], runs[2]]) == []
    assert differing_settings([runs[0], runs[3]]) == ["model.rotary"]
    assert set(differing_settings(runs[:2])) == {
        "model.rotary",
        "model.rotary.base",
        "model.rotary.fraction",
        "model.rotary.scaling",
    }


def test_the_paired_difference_is_second_minus_first_over_documents(tmp_path):
    first = make_run(tmp_path / "a", settings_of(2), reach=2)
    second = make_run(tmp_path / "b", settings_of(8), reach=8)
    pairs = paired_lengths(first, second)
    assert [pair.context_length for pair in pairs] == [4, 8]
    for pair in pairs:
        differences = [
            (two["nats"][str(pair.context_length)] - one["nats"][str(pair.context_length)])
            / math.log(2)
            / one["bytes"]
            for one, two in zip(first.result["documents"], second.result["documents"], strict=True)
        ]
        assert pair.difference["mean"] == pytest.approx(sum(differences) / 3)
        assert pair.difference["low"] < pair.difference["mean"] < pair.difference["high"]
        assert not pair.equivalence.equivalent
    same = paired_lengths(first, first)
    assert all(pair.equivalence.equivalent for pair in same)
    assert all((p.difference["mean"], p.difference["low"], p.difference["high"]) == (0, 0, 0) for p in same)


def test_documents_of_one_author_are_one_pair(tmp_path):
    runs = [
        make_run(tmp_path / str(reach), settings_of(reach), reach=reach, authors=["A", "B", "A"])
        for reach in (2, 8)
    ]
    for pair in paired_lengths(*runs):
        c, differences = str(pair.context_length), []
        for author in "AB":
            one, two = ([d for d in run.result["documents"] if d["author"] == author] for run in runs)
            nats = sum(d["nats"][c] for d in two) - sum(d["nats"][c] for d in one)
            differences.append(nats / math.log(2) / sum(d["bytes"] for d in one))
        assert pair.difference["pairs"] == 2
        assert pair.difference["mean"] == pytest.approx(sum(differences) / 2)


def test_documents_are_paired_by_hash_not_by_place(tmp_path):
    first = make_run(tmp_path / "a", settings_of(2), reach=2)
    second = make_run(tmp_path / "b", settings_of(8), reach=8)
    expected = paired_lengths(first, second)
    path = second.folder / "evaluation" / "length.json"
    result = json.loads(path.read_text())
    result["documents"].reverse()
    path.write_text(json.dumps(result))
    assert paired_lengths(first, read_run(second.folder)) == expected


def test_runs_with_other_lengths_but_the_same_longest_are_paired_at_the_common_ones(tmp_path):
    first = make_run(tmp_path / "a", settings_of(2), lengths=[2, 4, 8])
    second = make_run(tmp_path / "b", settings_of(8), lengths=[4, 8])
    assert [pair.context_length for pair in paired_lengths(first, second)] == [4, 8]


def test_runs_on_different_text_are_not_paired_and_the_message_says_what_to_do(tmp_path):
    first = make_run(tmp_path / "a", settings_of(2))
    for name, options in {"text": {"seed": 5}, "longest": {"lengths": [4, 16]}}.items():
        second = make_run(tmp_path / name, settings_of(2), **options)
        with pytest.raises(UserError) as caught:
            paired_lengths(first, second)
        message = str(caught.value)
        assert "cannot be paired" in message
        assert f"checkpoint={first.folder} data.path=TEXT 'evaluation.context_lengths=[4,8]'" in message
        assert f"checkpoint={second.folder} data.path=TEXT" in message
        assert message.endswith(
            f"compare_runs.py {first.folder} {second.folder} --evaluation evaluation_TEXT"
        )


def test_runs_with_different_tokenizers_are_told_apart(tmp_path):
    first = make_run(tmp_path / "a", settings_of(2))
    second = make_run(tmp_path / "b", settings_of(2), seed=5, tokenizer_identity="another")
    with pytest.raises(UserError, match="their tokenizers differ"):
        paired_lengths(first, second)


def test_the_evaluations_of_other_text_are_paired_by_their_name(tmp_path):
    runs = [make_run(tmp_path / name, settings_of(2), seed=seed) for seed, name in enumerate("ab")]
    for run in runs:
        other = make_run(run.folder / "other", settings_of(2), seed=7)
        (other.folder / "evaluation").rename(run.folder / "evaluation_book")
    first, second = (read_run(run.folder, "evaluation_book") for run in runs)
    assert [pair.context_length for pair in paired_lengths(first, second)] == [4, 8]
    assert [run.result["targets_hash"] for run in runs_in(tmp_path, "evaluation_book")] == [
        first.result["targets_hash"]
    ] * 2
    with pytest.raises(UserError, match="cannot be paired"):
        paired_lengths(*runs)


def test_commands_are_quoted_for_a_shell(tmp_path):
    first = make_run(tmp_path / "it's [a]", settings_of(2))
    second = make_run(tmp_path / "b", settings_of(2), seed=5)
    with pytest.raises(UserError) as caught:
        paired_lengths(first, second)
    lines = str(caught.value).splitlines()
    assert shlex.split(lines[1])[2] == f"checkpoint={first.folder}"
    assert shlex.split(lines[3])[2:4] == [str(first.folder), str(second.folder)]


def test_a_run_that_has_not_ended_cannot_be_paired(tmp_path):
    first = make_run(tmp_path / "a", settings_of(2))
    second = make_run(tmp_path / "b", settings_of(2), ended=False)
    with pytest.raises(UserError, match="not evaluated"):
        paired_lengths(first, second)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_folders_without_runs_are_named(tmp_path, make):
    folder = tmp_path / "folder"
    make(folder)
    with pytest.raises(UserError, match="folder of a sweep, or two run folders"):
        runs_in(folder)
    with pytest.raises(UserError, match="not a run"):
        read_run(folder)


def test_a_damaged_config_is_named(tmp_path):
    run = make_run(tmp_path / "a", settings_of(2), ended=False)
    (run.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        read_run(run.folder)
