"""The answer of a study whose truth is known: what each window loses is put in by hand."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from windowlm.errors import UserError
from windowlm.study.answer import answer_of, main_rows
from windowlm.study.cell_names import cell_names

from .test_setting_comparison import add_run, draws

SCRIPT = Path(__file__).parents[2] / "scripts" / "length_study.py"
BASES = {"full": 500_000.0, "full_10000": 10_000.0}
LOST = {"full": 0.0, "full_10000": 0.5, "window": 1.0, "hybrid": 0.25}
WINDOW = {"full": None, "full_10000": None, "window": 4, "hybrid": [4, 4, None]}


@pytest.fixture
def study(tmp_path):
    number = 0
    for seed in (0, 1):
        for cell, lost in LOST.items():
            path = tmp_path / "main" / str(number)
            number += 1
            # Authors differ much, seeds little.
            far = 2.0 + draws(7) + lost + 0.001 * draws(seed + 10)
            bits = 2.0 + draws(5) + (0.1 * lost if cell != "hybrid" else 1e-5) + 1e-5 * draws(seed + 20)
            add_run(path, WINDOW[cell], seed, bits, far_N=far, saved_N=draws(3) + 2.0)
            settings = json.loads((path / "config.json").read_text())
            if cell != "hybrid":
                settings["model"]["rotary"] = {"base": BASES.get(cell, 10_000.0)}
            else:
                settings["model"]["rotary"] = [{"base": 10_000.0}, {"base": 10_000.0}, None]
            (path / "config.json").write_text(json.dumps(settings))
            (path / "metrics.jsonl").write_text('{"tokens": 100, "seconds": 4.0}\n{"validation_loss": 1}\n')
            file = path / "evaluation" / "length.json"
            result = json.loads(file.read_text())
            result["rows"][0] |= {"naive_bits_per_byte": 4.0, "bits_per_byte": float(np.mean(bits))}
            file.write_text(json.dumps(result))
    return tmp_path


def test_each_question_is_answered_with_what_was_put_in(study):
    answer = answer_of(study, "evaluation")
    assert answer.base == "full, base 500,000"
    assert [cell.name for cell in answer.cells] == [
        "full, base 500,000",
        "full, base 10,000",
        "window 4",
        "hybrid 4, no positions",
    ]
    said = {question.split()[-1]: sentences for question, sentences in answer.sentences.items()}
    gate = said["best?"]
    assert "bytes back; the gate, 2, is met." in gate[0]
    equal = said["lose?"]
    assert "is not shown to be equal" in equal[1]
    assert "is equal to full, base 500,000 within 0.002" in equal[2]
    assert "That is 50% of what window 4 loses" in said["base?"][1]
    assert "hybrid 4, no positions wins back 75% of what window 4 loses" in said["back?"][0]
    assert said["cost?"] == ["Not measured: no cells with other numbers of key-value heads."]
    assert "25 tokens a second" in said["move?"][0]
    rows = {row["cell"]: row for row in main_rows(answer)}
    assert rows["window 4"]["far_repeats_difference"] == pytest.approx(1.75, rel=0.01)
    assert rows["hybrid 4, no positions"]["difference_8_equal"]
    assert rows["window 4"]["seeds"] == 2


def test_the_command_writes_tables_plots_and_the_page(study, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    monkeypatch.setattr(
        sys, "argv", [str(SCRIPT), str(study / "main"), "--evaluation", "evaluation", "--out", str(out)]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not ended.value.code
    names = {path.name for path in out.iterdir()}
    assert {"length_study.json", "main.csv", "claims.csv", "README.md", "loss_by_context.png"} <= names
    assert (out / "far_repeats.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "length_study.json").read_text())
    assert report["git_commit"] is None or len(report["git_commit"]) == 40
    page = (out / "README.md").read_text()
    assert all(sentence in page for sentences in report["sentences"].values() for sentence in sentences)
    assert "(./far_repeats.png)" in page
    assert "wins back 75%" in capsys.readouterr().out


def test_cells_of_longer_texts_are_compared_with_full_attention_at_its_best_there(study):
    """Full attention that was trained further is worse there than that with scaled positions."""
    added = [
        (None, 0.5, 64, {"base": 500_000.0}),
        (None, 0.1, 64, {"base": 500_000.0, "scaling": {"kind": "yarn"}}),
        (4, 0.1 + 1e-5, 64, {"base": 10_000.0}),
        ([4, 4, None], 0.3, 64, {"base": 500_000.0}),
    ]
    for number, (window, lost, length, rotary) in enumerate(added):
        path = study / "with more" / str(number)
        bits = 2.0 + draws(5) + lost + 1e-6 * draws(number)
        add_run(path, window, 0, bits)
        settings = json.loads((path / "config.json").read_text()) | {"data": {"sequence_length": length}}
        settings["model"]["rotary"] = [rotary]
        (path / "config.json").write_text(json.dumps(settings))
        file = path / "evaluation" / "length.json"
        result = json.loads(file.read_text()) | {"training_length": length}
        result["rows"][0] |= {"naive_bits_per_byte": 4.0, "bits_per_byte": float(np.mean(bits))}
        file.write_text(json.dumps(result))
    for file in (study / "main").glob("*/config.json"):
        settings = json.loads(file.read_text()) | {"data": {"sequence_length": 16}}
        file.write_text(json.dumps(settings))
    for file in (study / "main").glob("*/evaluation/length.json"):
        result = json.loads(file.read_text())
        result["rows"][0]["bits_per_byte"] += 1.0  # so far beyond its training none of these is a rival
        file.write_text(json.dumps(result))
    said = answer_of(study, "evaluation", "full, base 500,000").sentences["And of texts four times as long?"]
    assert "The best, full, base 500,000, scaled positions, trained at 64, is what" in said[0]
    assert said[0].count(";") == 3
    assert len(said) == 3
    assert "window 4, trained at 64: +0.0000" in said[1]
    assert "is equal to full, base 500,000, scaled positions, trained at 64 within 0.002 (authors)" in said[1]
    assert "is not shown to be equal" in said[2]


def add_tokens(study, within="same"):
    """Cells with tokens of two bytes, whose targets are confined to the bytes of the others."""
    for number, (window, lost) in enumerate([(None, 0.0), (4, 0.01)]):
        path = study / "bpe" / str(number)
        bits = 1.9 + draws(5) + lost + 1e-4 * draws(number)
        add_run(path, window, 0, bits, far_N=2.0 + draws(7) + lost)
        settings = json.loads((path / "config.json").read_text())
        settings |= {"tokenizer": {"kind": "bpe"}}
        settings["model"]["rotary"] = {"base": 500_000.0}
        (path / "config.json").write_text(json.dumps(settings))
        for file in (path / "evaluation").glob("**/*.json"):
            content = json.loads(file.read_text())
            if file.name == "length.json":
                content |= {"targets_hash": "tokens", "targets_within": within, "tokenizer_identity": "bpe"}
                content["rows"][0] |= {"naive_bits_per_byte": 4.0, "bits_per_byte": float(np.mean(bits))}
                content["rows"][0] |= {"targets": 4, "bytes": 9}
            else:
                content["settings"]["targets_hash"] = "tokens"
            file.write_text(json.dumps(content))


def test_cells_of_another_tokenizer_are_compared_among_themselves_and_by_bytes(study):
    before = answer_of(study, "evaluation")
    add_tokens(study)
    answer = answer_of(study, "evaluation")
    assert answer.base == before.base
    assert [cell.name for cell in answer.cells[4:]] == [
        "full, base 500,000, bpe tokenizer",
        "window 4, bpe tokenizer",
    ]
    assert [claim for claim in answer.claims if "bpe" not in claim.setting] == list(before.claims)
    for question, sentences in before.sentences.items():
        assert answer.sentences[question] == sentences
    said = answer.sentences["Does it hold with other tokens?"]
    assert said[0] == "Of full, base 500,000, bpe tokenizer a token has 2.25 bytes."
    assert said[1].startswith("window 4, bpe tokenizer: +0.01")
    assert "is not shown to be equal; on far repeats" in said[1]
    assert "over authors -0.0999" in said[2]
    assert "90.000% of the bytes are the same" in said[2]
    row = main_rows(answer)[-1]
    assert (row["cell"], row["against"]) == ("window 4, bpe tokenizer", "full, base 500,000, bpe tokenizer")
    assert row["difference_8"] == pytest.approx(0.01, abs=0.001)
    turned = answer_of(study, "evaluation", "window 4, bpe tokenizer")
    assert turned.cells[0].name == turned.base == "window 4, bpe tokenizer"


def test_different_text_is_not_compared_by_bytes(study):
    add_tokens(study, within="others")
    said = answer_of(study, "evaluation").sentences["Does it hold with other tokens?"]
    assert said[-1].endswith("which are of different text.")


def test_another_cell_may_be_the_base_and_one_that_is_not_there_is_named(study):
    assert answer_of(study, "evaluation", "window 4").base == "window 4"
    with pytest.raises(UserError, match=r"--base x: there is no such cell; there are: .*window 4"):
        answer_of(study, "evaluation", "x")


def test_cells_are_named_by_what_tells_them_apart():
    plain = {"model.window": 4, "model.kv_heads": 2, "data.sequence_length": 64}
    full = {"model.window": None, "model.kv_heads": 2, "data.sequence_length": 64}
    cells = {
        "a": plain,
        "b": plain | {"model.kv_heads": 1},
        "c": full | {"model.rotary.base": 1e4},
        "d": full | {"model.rotary": [None]},
        "e": full
        | {"model.rotary": [{"base": 1e4, "scaling": {"kind": "yarn"}}], "data.sequence_length": 256},
        "f": plain | {"model.window": [2, 4]},
        "g": plain | {"optimizer.lr": 1.0},
        "h": plain | {"tokenizer.kind": "bpe", "trainer.max_tokens": 5},
        "i": full | {"tokenizer.kind": "bpe", "trainer.max_tokens": 5, "model.rotary": [None]},
        "j": plain | {"tokenizer.kind": "bpe", "trainer.max_tokens": 3},
        "k": plain | {"tokenizer.kind": "folder", "data.sequence_length": 256, "trainer.max_tokens": 2},
    }
    assert cell_names(cells) == {
        "a": "window 4 (a)",
        "b": "window 4, 1 KV heads",
        "c": "full, base 10,000",
        "d": "full, no positions",
        "e": "full, base 10,000, scaled positions, trained at 256",
        "f": "windows 2 and 4",
        "g": "window 4 (g)",
        "h": "window 4, bpe tokenizer",
        "i": "full, no positions, bpe tokenizer",
        "j": "window 4, bpe tokenizer, 3 tokens",
        "k": "window 4, trained at 256",
    }


def test_what_lies_beyond_the_training_decides_nothing(study):
    """There full attention breaks most, on far repeats too, and the order of the cells is another."""
    for number, file in enumerate(sorted(study.glob("main/*/evaluation/length.json"))):
        result = json.loads(file.read_text())
        beyond = {"context_length": 16, "extrapolation": True, "bits_per_byte": 9.0 + number}
        result["rows"].append(result["rows"][0] | beyond | {"naive_bits_per_byte": 30.0 - number})
        for document in result["documents"]:
            document["nats"]["16"] = 5 * np.log(2) * (9.0 + number)
        file.write_text(json.dumps(result))
        measured_file = file.parent / "study" / "far_repeats.json"
        measured = json.loads(measured_file.read_text())
        for row in measured["clusters"]:
            row["nats"]["16"] = row["bytes"] * (20.0 - number)
        measured_file.write_text(json.dumps(measured))
    answer = answer_of(study, "evaluation")
    assert answer.base == "full, base 500,000"
    said = {question.split()[-1]: sentences for question, sentences in answer.sentences.items()}
    assert "at c = 8, and is not shown to be equal" in said["lose?"][1]
    assert "That is 50% of what window 4 loses" in said["base?"][1]
    assert "hybrid 4, no positions wins back 75% of what window 4 loses" in said["back?"][0]
    assert not any("c = 16" in sentence for sentence in said["artefact?"])
    rows = {row["cell"]: row for row in main_rows(answer)}
    assert rows["window 4"]["far_repeats_context"] == 8
    assert rows["window 4"]["far_repeats_difference"] == pytest.approx(1.75, rel=0.01)


def test_a_ranking_is_turned_round_where_the_honest_difference_is_certain(study):
    for file in study.glob("main/*/evaluation/length.json"):
        result = json.loads(file.read_text())
        settings = json.loads((file.parents[1] / "config.json").read_text())["model"]
        result["rows"][0]["naive_bits_per_byte"] = 3.0 if settings["window"] == 4 else 4.0
        file.write_text(json.dumps(result))
    said = answer_of(study, "evaluation").sentences["How much of the naive gain is an artefact?"][-1]
    assert "full, base 500,000 and window 4 at c = 8" in said


def test_cells_are_compared_within_the_training_of_both(study):
    """Windows that were trained further than full attention, which is broken at their longest context."""
    for number, file in enumerate(sorted(study.glob("main/*/evaluation/length.json"))):
        result = json.loads(file.read_text())
        further = json.loads((file.parents[1] / "config.json").read_text())["model"]["window"] == 4
        beyond = {
            "context_length": 16,
            "extrapolation": not further,
            "bits_per_byte": 1.0 if further else 9.0,
        }
        result["rows"].append(result["rows"][0] | beyond)
        for document in result["documents"]:
            document["nats"]["16"] = 5 * np.log(2) * beyond["bits_per_byte"]
        file.write_text(json.dumps(result))
        measured_file = file.parent / "study" / "far_repeats.json"
        measured = json.loads(measured_file.read_text())
        for row in measured["clusters"]:
            row["nats"]["16"] = row["bytes"] * float(number)
        measured_file.write_text(json.dumps(measured))
    answer = answer_of(study, "evaluation")
    row = next(row for row in main_rows(answer) if row["cell"] == "window 4")
    base = next(row for row in main_rows(answer) if row["cell"] == answer.base)
    assert row["far_repeats_context"] == base["far_repeats_context"] == 8
    told = row["far_repeats_nats_per_byte"] - base["far_repeats_nats_per_byte"]
    assert told == pytest.approx(row["far_repeats_difference"])
    said = answer.sentences["Which windows are equal to full attention, and what do they lose?"]
    assert all("c = 8, and" in sentence for sentence in said)


def test_rows_of_seeds_are_joined_by_their_context_length(study):
    first = sorted(study.glob("main/*/evaluation/length.json"))[0]
    result = json.loads(first.read_text())
    result["rows"].insert(0, result["rows"][0] | {"context_length": 4, "bits_per_byte": 50.0})
    for document in result["documents"]:
        document["nats"]["4"] = 1.0
    first.write_text(json.dumps(result))
    cell = answer_of(study, "evaluation").cells[0]
    assert [row["context_length"] for row in cell.rows] == [8]
    assert cell.rows[0]["bits_per_byte"] < 10
