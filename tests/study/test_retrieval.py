"""Pasted spans and forced choice on models that can copy from a known distance, and on one that cannot."""

import math

import numpy as np
import pytest
import torch

from tests.evaluation.fakes import UniformModel
from windowlm.study.forced_choice import forced_choice, question
from windowlm.study.pasted_spans import pasted, pasted_spans
from windowlm.study.places import character_start, draw_places
from windowlm.tokenization.tokenizer import BytePairTokenizer
from windowlm.tokenization.training import train_bpe

from .oracles import InductionModel, letters, scored

TEXTS = [letters(3000, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def subject_of(model, texts=TEXTS, **options):
    return scored(model, texts, lengths=(8, 16), max_targets=48, **options)[0]


def test_a_uniform_model_saves_nothing_and_chooses_by_chance():
    subject = subject_of(UniformModel(256))
    spans = pasted_spans(subject, [64, 256], span=64, places=2, window=512, seed=0)
    assert {row["saved"] for row in spans["rows"]} == {0.0}
    assert all(row["nats_per_byte_with"] == pytest.approx(math.log(256), rel=1e-12) for row in spans["rows"])
    choice = forced_choice(subject, [128, 256], [0.0, 0.5], places=4, window=1024, seed=0)
    assert len(choice["rows"]) == 4
    assert all(row["right"] == pytest.approx(0.1) for row in choice["rows"])
    assert len(choice["clusters"]) == 4 * 3
    assert all(row["right"] == pytest.approx(0.1 * row["questions"]) for row in choice["clusters"])


def test_a_copying_model_saves_all_within_its_reach_and_nothing_beyond():
    subject = subject_of(InductionModel(reach=300, letters=8))
    found = pasted_spans(subject, [64, 256, 299, 302, 440], span=64, places=2, window=512, seed=0)
    rows = {row["distance"]: row for row in found["rows"] if row["span"] == "random"}
    for distance in (64, 256, 299):
        assert rows[distance]["nats_per_byte_with"] < 1e-6
        assert rows[distance]["saved"] == pytest.approx(math.log(256), rel=0.01)
    for distance in (302, 440):
        assert rows[distance]["saved"] == pytest.approx(0, abs=1e-9)
    assert {row["authors"] for row in found["rows"]} == {3}


def test_a_looking_up_model_chooses_right_within_its_reach_and_by_chance_beyond():
    subject = subject_of(InductionModel(reach=400, letters=9))
    found = forced_choice(subject, [128, 256, 512, 1024], [0.0, 0.5], places=5, window=1100, seed=0)
    right = {(row["distance"], row["depth"]): row["right"] for row in found["rows"]}
    for depth in (0.0, 0.5):
        assert right[128, depth] == right[256, depth] == 1.0
    assert right[512, 0.0] == right[1024, 0.0] == pytest.approx(0.1)
    assert (1024, 0.5) not in right
    assert "No room at 1,024 bytes and depth 0.5 in 1,100 bytes." in found["left_out"]


def test_a_model_that_takes_the_last_value_read_is_right_by_chance():
    """Recency does not help: every value has been read."""

    class LastValue(InductionModel):
        def predicted(self, tokens):
            last, found = None, []
            for place, token in enumerate(tokens):
                if place and tokens[place - 1] == ord("="):
                    last = token
                found.append(last)
            return found

    subject = subject_of(LastValue(reach=1, letters=1))
    found = forced_choice(subject, [256], [0.0], places=60, window=1024, seed=0)
    (row,) = found["rows"]
    assert row["questions"] == 180
    assert 0.03 < row["right"] < 0.19


def test_the_questions_of_the_authors_are_those_of_the_share():
    subject = subject_of(InductionModel(reach=400, letters=9))
    found = forced_choice(subject, [256, 512], [0.0, 0.5], places=5, window=1100, seed=0)
    for row in found["rows"]:
        own = [
            each for each in found["clusters"] if all(each[key] == row[key] for key in ("distance", "depth"))
        ]
        assert sorted(each["questions"] for each in own) == [5, 5, 5]
        assert sum(each["right"] for each in own) == pytest.approx(row["right"] * row["questions"])


def test_the_text_with_a_copy_differs_in_the_copy_alone():
    background = letters(500).encode()
    lone, copied = (b"".join(pasted(background, b"X" * 40, d)) for d in (None, 100))
    assert len(lone) == len(copied) == 500
    assert copied[360:400] == b"X" * 40
    assert copied[:360] == lone[:360] == background[:360]
    assert copied[400:] == lone[400:]
    assert lone[460:] == b"X" * 40


def test_pieces_are_cut_between_characters():
    background = ("é漢😀" * 60).encode()
    for distance in range(64, 90):
        for piece in pasted(background, "ß".encode() * 16, distance):
            piece.decode()
    assert [character_start("a漢b".encode(), position) for position in range(6)] == [0, 1, 1, 1, 4, 5]


def test_a_question_holds_its_answer_and_ten_values():
    subject = subject_of(UniformModel(256))
    (place, *_), _ = draw_places(subject, 400, 0, 1, seed=1)
    values = [bytes([letter]) for letter in b"abcdefghij"]
    pieces, answer = question(place, 100, values)
    text = b"".join(pieces)
    facts = dict(line.split(b"=") for line in text[101:211].split(b"\n")[:10])
    assert len(facts) == 10
    assert sorted(facts.values()) == values
    asked = text.rsplit(b"\n", 1)[1].removesuffix(b"=")
    assert facts[asked] == values[answer]
    assert len(text) == 400 + 1 + 8 + 1


def test_places_depend_on_nothing_but_seed_and_documents():
    forward, backward = subject_of(UniformModel(256)), subject_of(UniformModel(256), TEXTS[::-1])
    places = [sorted(p.background for p in draw_places(s, 300, 64, 2, 7)[0]) for s in (forward, backward)]
    assert places[0] == places[1]
    other = sorted(p.background for p in draw_places(forward, 300, 64, 2, 8)[0])
    assert other != places[0]


def test_authors_without_room_are_counted_and_named():
    subject = subject_of(UniformModel(256), [letters(3000), letters(200, 1)], authors=["A", "B"])
    found = pasted_spans(subject, [64, 5000], span=64, places=1, window=512, seed=0)
    assert found["left_out"] == [
        "No room for spans of 64 at 5,000 bytes in 512 bytes of text.",
        "1 authors have no document of 576 bytes.",
    ]
    assert {row["authors"] for row in found["rows"]} == {1}
    none = pasted_spans(subject, [5000], span=64, places=1, window=512, seed=0)
    assert (none["rows"], len(none["left_out"])) == ([], 1)


def test_results_do_not_depend_on_the_batch_size():
    one, many = (
        pasted_spans(
            subject_of(InductionModel(reach=300, letters=8), batch_tokens=size),
            [64, 256],
            span=64,
            places=2,
            window=512,
            seed=0,
        )["rows"]
        for size in (1, 100_000)
    )
    assert one == many
    assert np.isfinite(one[0]["saved"])


def test_tokens_of_several_bytes_are_measured_by_their_bytes():
    texts = [("größe und weite, " + letters(12, seed, "abc ")) * 90 for seed in range(3)]
    tokenizer = BytePairTokenizer(train_bpe(texts, 320, "<end>"), "<end>")
    model = UniformModel(tokenizer.vocabulary_size)
    subject = scored(model, texts, lengths=(8, 16), max_targets=48, tokenizer=tokenizer)[0]
    assert subject.window_bytes > subject.training_length
    found = pasted_spans(subject, [64, 256], span=64, places=2, window=600, seed=0)
    assert {row["saved"] for row in found["rows"]} == {0.0}
    places, _ = draw_places(subject, 600, 64, 2, 0)
    nats = byte_count = 0
    for place in places:
        tokens = tokenizer.encode(place.behind.decode())
        starts = np.cumsum(tokenizer.token_bytes_V[tokens]) - tokenizer.token_bytes_V[tokens]
        nats += math.log(tokenizer.vocabulary_size) * (starts >= 16).sum()
        byte_count += tokenizer.token_bytes_V[tokens][starts >= 16].sum()
    natural = next(row for row in found["rows"] if row["span"] == "natural")
    assert natural["nats_per_byte_without"] == pytest.approx(nats / byte_count, rel=0.05)
    choice = forced_choice(subject, [256], [0.0], places=2, window=1024, seed=0)
    assert choice["rows"][0]["right"] == pytest.approx(0.1)
