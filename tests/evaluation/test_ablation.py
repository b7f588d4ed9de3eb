"""Changes against a base, over seeds."""

import json

import numpy as np
import pytest
from scipy.stats import ttest_ind

from windowlm.errors import UserError
from windowlm.evaluation.ablation import effects, read_cells
from windowlm.evaluation.comparison import BASE
from windowlm.evaluation.result import FORMAT


def make_run(folder, settings, bits, *, seed=0, targets_hash="same", rows=((1.0, 100, 4.0), (3.0, 300, 2.0))):
    """The least that an evaluated run holds; two bytes a token."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**settings, "seed": seed, "run_dir": str(folder)}))
    prepared = {"prepared_data": {"train": {"bytes": 2000, "tokens": 1000}}}
    (folder / "run.json").write_text(json.dumps({**prepared, "device": "a CPU"}))
    (folder / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": 1, "seconds": seconds, "tokens": tokens, "train_bits_per_byte": rate}) + "\n"
            for seconds, tokens, rate in rows
        )
        + json.dumps({"step": 1, "validation_bits_per_byte": 1.0})
        + "\n"
    )
    if bits is not None:
        result = {
            "format": FORMAT,
            "rows": [
                {
                    "context_length": c,
                    "bits_per_byte": rate,
                    "nats": 3.5 * rate,
                    "perplexity": 2.0,
                    "targets": 5,
                    "bytes": 5,
                    "extrapolation": False,
                }
                for c, rate in ((4, 9.0), (8, bits))
            ],
            "cluster": "document",
            "targets_hash": targets_hash,
            "tokenizer_identity": "bytes",
            "precision": "32-true",
            "parameters": 1000,
            "tokens_trained": 500,
            "documents": [{"document_hash": "a", "author": None, "bytes": 5, "nats": {"4": 9.0, "8": bits}}],
        }
        (folder / "evaluation").mkdir()
        (folder / "evaluation" / "length.json").write_text(json.dumps(result))


NGRAMS = {"model": {"ngram_embeddings": {"orders": [2, 3], "dim": None}, "window": 8}}
PLAIN = {"model": {"ngram_embeddings": None, "window": 8}}
WIDE = {"model": {"ngram_embeddings": {"orders": [2, 3], "dim": None}, "window": 16}}
SCORES = {"ngrams": [1.50, 1.52, 1.51], "plain": [1.60, 1.63, 1.61], "wide": [1.51, 1.50, 1.53]}


@pytest.fixture
def sweep(tmp_path):
    """Three cells over three seeds, interleaved as a sweep makes them."""
    for seed in range(3):
        for place, (name, settings) in enumerate((("ngrams", NGRAMS), ("plain", PLAIN), ("wide", WIDE))):
            make_run(tmp_path / str(3 * seed + place), settings, SCORES[name][seed], seed=seed)
    return tmp_path


def test_runs_that_differ_in_their_seed_are_one_cell_and_the_first_is_the_base(sweep):
    cells = read_cells(sweep)
    assert [cell.label for cell in cells] == [BASE, "model.ngram_embeddings=null", "model.window=16"]
    assert [cell.scores for cell in cells] == [SCORES["ngrams"], SCORES["plain"], SCORES["wide"]]
    assert cells[0].seeds == [0, 1, 2]
    assert cells[0].mean == pytest.approx(1.51)
    assert cells[0].deviation == pytest.approx(0.01)
    assert cells[0].bytes_trained == 1000


def test_effects_are_differences_of_means_with_welchs_p_corrected_over_the_table(sweep):
    plain, wide = effects(read_cells(sweep))
    assert plain.difference == pytest.approx(np.mean(SCORES["plain"]) - np.mean(SCORES["ngrams"]))
    expected = [
        float(ttest_ind(SCORES[name], SCORES["ngrams"], equal_var=False).pvalue) for name in ("plain", "wide")
    ]
    assert [plain.p, wide.p] == pytest.approx(expected)
    assert [plain.p_holm, wide.p_holm] == pytest.approx([2 * expected[0], expected[1]])


def test_one_seed_has_a_difference_and_no_p_and_an_unfinished_run_has_neither(tmp_path):
    make_run(tmp_path / "0", NGRAMS, 1.5)
    make_run(tmp_path / "1", PLAIN, 1.6)
    make_run(tmp_path / "2", WIDE, None)
    plain, wide = effects(read_cells(tmp_path))
    assert (plain.difference, plain.p, plain.p_holm) == (pytest.approx(0.1), None, None)
    assert (wide.difference, wide.p, wide.cell.unfinished) == (None, None, 1)


def test_curves_are_means_over_seeds_at_equal_seconds_and_at_equal_bytes(tmp_path):
    make_run(tmp_path / "0", NGRAMS, 1.5, rows=[(2.0, 100, 4.0), (4.0, 200, 2.0)])
    make_run(tmp_path / "1", NGRAMS, 1.5, seed=1, rows=[(2.0, 50, 2.0), (8.0, 400, 2.0)])
    (cell,) = read_cells(tmp_path)
    assert cell.curve is not None
    assert (cell.curve.seconds[-1], cell.curve.bytes[-1]) == (4.0, 400.0)
    assert cell.curve.bits_at_seconds == pytest.approx([3.0] * 30 + [2.0] * 30)
    assert cell.curve.bits_at_bytes == pytest.approx([3.0] * 30 + [2.0] * 30)


def test_runs_that_scored_different_text_are_refused(tmp_path):
    make_run(tmp_path / "0", NGRAMS, 1.5)
    make_run(tmp_path / "1", PLAIN, 1.6, targets_hash="other")
    with pytest.raises(UserError, match="scored different text"):
        read_cells(tmp_path)
