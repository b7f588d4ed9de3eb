"""Tables, CSV and plot of compared runs."""

import csv
import json

import pytest
from rich.console import Console

from windowlm.errors import UserError
from windowlm.evaluation.comparison_report import compare_folder, compare_two

from .test_comparison import make_run, settings_of


def printed(compare, *arguments, width=100):
    console = Console(width=width)
    with console.capture() as capture:
        compare(*arguments, console)
    return capture.get()


def test_a_folder_gives_one_table_one_csv_and_one_plot(tmp_path):
    runs = [
        make_run(tmp_path / f"{number}", settings_of(window, kv_heads), reach=number + 1)
        for number, (window, kv_heads) in enumerate([(64, 1), (64, 4), ([64, None], 1), (None, 4)])
    ]
    make_run(tmp_path / "4", settings_of(256), ended=False)
    text = printed(compare_folder, tmp_path)
    assert "window" in text
    assert "kv_heads" in text
    assert "precision" not in text
    assert "[64,null]" in text
    assert "unfinished" in text
    for run in runs:
        for row in run.result["rows"]:
            assert f"{row['bits_per_byte']:.4f}" in text
            assert f"{row['perplexity']:.2f}" in text
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [(row["run"], row["context_length"]) for row in rows] == [
        (str(n), c) for n in range(4) for c in "48"
    ]
    assert rows[4]["model.window"] == "[64,null]"
    assert float(rows[0]["bits_per_byte"]) == runs[0].result["rows"][0]["bits_per_byte"]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_on_different_text_or_tokenizers_carry_a_warning(tmp_path):
    make_run(tmp_path / "a", settings_of(64))
    make_run(tmp_path / "b", settings_of(64), seed=5, tokenizer_identity="another")
    text = printed(compare_folder, tmp_path)
    assert "did not all score the same text" in text
    assert "compare bits per byte, not perplexities" in text


@pytest.mark.parametrize("varied", [0, 3, 4])
def test_any_number_of_varied_settings_can_be_drawn(tmp_path, varied):
    for number in range(2):
        settings = {f"setting_{k}": number for k in range(varied)}
        make_run(tmp_path / str(number), settings, reach=number + 1)
    printed(compare_folder, tmp_path)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_in_which_no_run_has_ended_is_an_error(tmp_path):
    make_run(tmp_path / "a", settings_of(64), ended=False)
    with pytest.raises(UserError, match="none of its 1 runs holds a result in evaluation/"):
        printed(compare_folder, tmp_path)


def test_two_runs_give_the_differing_settings_and_the_paired_difference(tmp_path):
    first = make_run(tmp_path / "a", settings_of(64), reach=2)
    second = make_run(tmp_path / "b", settings_of(None), reach=8)
    text = printed(compare_two, first.folder, second.folder)
    (line,) = [line for line in text.splitlines() if "model.window" in line]
    assert "64" in line
    assert "null" in line
    assert "kv_heads" not in text
    row = second.result["rows"][1]
    assert f"{row['bits_per_byte']:.4f}" in text
    assert "±" in text
    assert "the mean of 3 documents, each counted once" in " ".join(text.split())


def test_two_runs_on_different_text_still_show_their_settings(tmp_path, capsys):
    first = make_run(tmp_path / "a", settings_of(64))
    second = make_run(tmp_path / "b", settings_of(None), seed=5)
    with pytest.raises(UserError, match="cannot be paired"):
        compare_two(first.folder, second.folder, Console(width=160))
    assert "model.window" in capsys.readouterr().out


def test_a_wide_table_leaves_middle_lengths_to_the_csv(tmp_path):
    lengths = [2**power for power in range(13)]
    for number in range(2):
        settings = {"model": {"window": 64 * number, "kv_heads": number}, "precision": f"bf16-mixe{number}"}
        run = make_run(tmp_path / str(number), settings)
        path = run.folder / "evaluation" / "length.json"
        result = json.loads(path.read_text())
        result["rows"] = [{**result["rows"][0], "context_length": length} for length in lengths]
        for document in result["documents"]:
            document["nats"] = dict.fromkeys(map(str, lengths), 1.0)
        path.write_text(json.dumps(result))
    text = printed(compare_folder, tmp_path)
    table = text[: text.index("By context")]
    assert max(map(len, text.splitlines()[:-2])) <= 100
    assert " 1 " in table
    assert "4,096" in table
    assert "…" not in table
    assert "The CSV holds the lengths that have no room here" in " ".join(text.split())
    assert all(f"{length:,}" in printed(compare_folder, tmp_path, width=200) for length in lengths)


def test_twelve_runs_over_three_settings_fit_a_hundred_columns(tmp_path):
    for number in range(2):
        settings = {"model": {"window": 256 * number, "kv_heads": number}, "precision": f"bf16-mixe{number}"}
        make_run(tmp_path / str(number), settings, lengths=[2, 4, 8, 16, 32])
    text = printed(compare_folder, tmp_path)
    assert max(map(len, text.splitlines()[:-2])) <= 100
    for heading in (
        "window",
        "kv_heads",
        "precision",
        "parameters",
        "tokens",
        " 2 ",
        " 4 ",
        " 8 ",
        " 16 ",
        " 32",
    ):
        assert heading in text


def test_names_that_look_like_markup_are_shown_to_the_letter(tmp_path):
    folder = tmp_path / "[/red] :smile:"
    for name in ("[bold]", "[/bold]"):
        make_run(folder / name, {"logger_name": name, "[/i]": name}, reach=len(name))
    text = printed(compare_folder, folder, width=200)
    assert f"'{folder}'" in text
    assert f"'{folder / 'comparison.csv'}'" in text
    for name in ("[bold]", "[/bold]", "[/i]"):
        assert name in text
    assert "[/bold]" in printed(compare_two, folder / "[bold]", folder / "[/bold]", width=400)
