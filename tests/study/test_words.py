"""Words, far repeats and key words, each beside a slow twin or a count by hand."""

import math

import numpy as np
import pytest

from windowlm.errors import UserError
from windowlm.evaluation.target_losses import TargetLosses
from windowlm.study.far_repeats import far_repeats, repeat_distances, target_distances
from windowlm.study.key_words import Chooser, key_targets, key_words, word_of_target
from windowlm.study.rare_words import RareWords
from windowlm.study.words import SPACED, byte_offsets, words_of


def losses_of_text(texts, token_sizes=None, lengths=(2, 8), first=0, authors=None, seed=0):
    """Losses of random nats; tokens of one byte, or of the given sizes."""
    generator = np.random.default_rng(seed)
    sizes = [
        np.ones(len(text.encode()) - first, dtype=int) if token_sizes is None else np.array(token_sizes)
        for text in texts
    ]
    counts = [len(size) for size in sizes]
    total = sum(counts)
    return TargetLosses(
        targets_hash="hash",
        tokenizer_identity="bytes",
        document_hashes=[f"h{number}" for number in range(len(texts))],
        authors=authors or [None] * len(texts),
        document=np.repeat(np.arange(len(texts), dtype=np.int32), counts),
        token=np.concatenate([first + np.arange(count) for count in counts]),
        first_byte=np.concatenate([first + np.cumsum(size) - size for size in sizes]),
        byte_count=np.concatenate(sizes).astype(np.int32),
        nats={c: generator.exponential(size=total) for c in lengths},
        naive_nats={c: generator.exponential(size=total) for c in lengths},
    )


def by_hash(texts):
    return {f"h{number}": text for number, text in enumerate(texts)}


def test_bytes_of_characters_are_counted():
    text = "aé漢😀b"
    assert byte_offsets(text).tolist() == [0, 1, 3, 6, 10, 11]
    assert [len(text[:n].encode()) for n in range(6)] == byte_offsets(text).tolist()


def test_words_are_found_in_the_bytes():
    text = "Größe, ÉTÉ_2 don't 漢字 X"
    data = text.encode()
    words = words_of(text)
    assert words.names == ["grösse", "été", "don", "t", "漢字", "x"]
    spelled = [data[a:b].decode() for a, b in zip(words.start, words.end, strict=True)]
    assert spelled == ["Größe", "ÉTÉ", "don", "t", "漢字", "X"]
    rest = [data[a:b].decode() for a, b in zip(words.after_third_letter, words.end, strict=True)]
    assert rest == ["ße", "", "", "", "", ""]
    assert words_of(text, SPACED).names == ["grösse,", "été_2", "don't", "漢字", "x"]
    assert words_of("").names == []


def test_rare_is_below_one_in_a_million_training_words():
    texts = ["Common " * 999_998 + "once ONCE"]
    rare = RareWords(texts)
    assert rare.training_words == 1_000_000
    # Two in a million are not below one in a million, and neither is one.
    assert "once" not in rare
    assert "unseen" in rare
    assert "once" in RareWords(["common " * 2_000_001 + "once"])


def test_rare_words_are_counted_once_and_again_where_the_file_is_damaged(tmp_path):
    path = tmp_path / "rare" / "words.json"
    counted = RareWords.kept_in(path, ["Ant bee " * 600_000 + "once"])
    assert (counted.training_words, counted.frequent) == (1_200_001, {"ant", "bee"})
    kept = RareWords.kept_in(path, ["other"])
    assert (kept.training_words, kept.frequent) == (counted.training_words, counted.frequent)
    assert "once" in kept
    path.write_text('{"frequent"')
    assert RareWords.kept_in(path, ["other"]).frequent == {"other"}
    (tmp_path / "file").touch()
    assert RareWords.kept_in(tmp_path / "file" / "words.json", ["other"]).frequent == {"other"}


def test_the_distance_is_that_to_the_last_use_behind_the_third_letter():
    text = "Zebra and zebra, or ZEBRA and and"
    distances = repeat_distances(text, {"zebra"})
    expected = np.zeros(len(text), dtype=int)
    expected[13:15] = 10
    expected[23:25] = 10
    assert distances.tolist() == expected.tolist()
    assert repeat_distances("zebra " * 2, set()).tolist() == [0] * 12


def test_a_token_counts_where_all_its_bytes_do():
    text = "zebra zebra"
    losses = losses_of_text([text], token_sizes=[6, 3, 1, 1])
    assert target_distances(losses, by_hash([text]), {"zebra"}).tolist() == [0, 0, 6, 6]
    losses = losses_of_text([text], token_sizes=[6, 2, 3])
    assert target_distances(losses, by_hash([text]), {"zebra"}).tolist() == [0, 0, 0]


def test_far_repeats_are_what_a_slow_count_says():
    generator = np.random.default_rng(1)
    vocabulary = ["zebra", "Quagga", "of", "the", "größenwahn"]
    texts = [" ".join(generator.choice(vocabulary, size=80)) for _ in range(4)]
    rare = {"zebra", "quagga", "grössenwahn"}
    losses = losses_of_text(texts, first=20, authors=["A", "B", "A", None])
    found = far_repeats(losses, by_hash(texts), rare, [8, 16, 64])
    for low, high in ((8, 16), (16, 64), (64, 10**9)):
        nats = {2: 0.0, 8: 0.0}
        count = 0
        for number, text in enumerate(texts):
            words, place, last = text.split(" "), 0, {}
            for word in words:
                name = word.casefold()
                if name in rare and name in last and low <= place - last[name] < high:
                    start = place + len(word[:3].encode())
                    for byte in range(start, place + len(word.encode())):
                        if byte >= 20:
                            count += 1
                            where = np.flatnonzero((losses.document == number) & (losses.first_byte == byte))
                            for c in nats:
                                nats[c] += float(losses.nats[c][where[0]])
                last[name] = place
                place += len(word.encode()) + 1
        rows = {row["context_length"]: row for row in found["rows"] if row["distance_from"] == low}
        if not count:
            assert not rows
            continue
        for c, total in nats.items():
            assert rows[c]["bytes"] == count
            assert rows[c]["nats"] == pytest.approx(total)
            assert rows[c]["nats_per_byte"] == pytest.approx(total / count)
    assert sum(row["bytes"] for row in found["clusters"]) == sum(
        row["bytes"] for row in found["rows"] if row["context_length"] == 2
    )


def test_a_bin_without_repeats_is_said_to_be_empty():
    text = "zebra zebra"
    found = far_repeats(losses_of_text([text]), by_hash([text]), {"zebra"}, [5, 10, 100])
    assert {row["distance_from"] for row in found["rows"]} == {5}
    assert found["left_out"] == ["No far repeat lies 10 to 100 bytes, from 100 bytes back."]


def test_targets_belong_to_the_word_that_they_end_in():
    text = "one two\nthree"
    tokens = [3, 4, 1, 3, 2]  # one| two|\n|thr|ee
    losses = losses_of_text([text, text], token_sizes=tokens)
    assert word_of_target(losses, by_hash([text, text])).tolist() == [0, 1, -1, 2, 2, 3, 4, -1, 5, 5]
    # A word that begins before the first target is not whole.
    assert word_of_target(losses_of_text([text], first=5), by_hash([text])).tolist() == [
        *[-1] * 3,
        *[2] * 5,
    ]


def test_key_words_are_those_whose_summed_gain_reaches_the_threshold():
    text = "ab cd"
    chooser = losses_of_text([text], lengths=(2, 8, 16))
    chooser.nats[2][:] = [1.5, 1.5, 9.0, 3.0, 0.0]
    chooser.nats[8][:] = [0.5, 0.4, 0.0, 0.5, 1.0]
    chooser.nats[16][:] = 9.0  # beyond its training
    words = word_of_target(chooser, by_hash([text]))
    assert key_targets(Chooser(chooser, 8, "other"), words, 2.0).tolist() == [True, True, False, False, False]
    measured = losses_of_text([text], seed=5)
    found = key_words(measured, "own", {"other": Chooser(chooser, 8, "other")}, by_hash([text]), 2.0)
    assert [row["words"] for row in found["rows"]] == [1, 1]
    for row in found["rows"]:
        assert row["nats"] == pytest.approx(math.fsum(measured.nats[row["context_length"]][:2]))
        assert row["nats_per_word"] == row["nats"]


def test_a_model_may_not_choose_its_own_key_words():
    text = "ab cd"
    losses, other = losses_of_text([text]), losses_of_text([text], seed=2)
    with pytest.raises(UserError, match=r"^study\.choosers=me: .*may not choose its own"):
        key_words(losses, "own", {"me": Chooser(other, 8, "own")}, by_hash([text]), 2.0)
    with pytest.raises(UserError, match="one context length only"):
        key_words(losses, "own", {"it": Chooser(other, 2, "other")}, by_hash([text]), 2.0)
    shorter = losses_of_text(["ab"], seed=2)
    with pytest.raises(UserError, match="other targets"):
        key_words(losses, "own", {"it": Chooser(shorter, 8, "other")}, by_hash([text]), 2.0)


def test_of_several_choosers_the_measured_run_is_left_out():
    text = "ab cd"
    losses, other = losses_of_text([text]), losses_of_text([text], seed=2)
    other.nats[2][:] = other.nats[8] + 1.5
    choosers = {"me": Chooser(losses, 8, "own"), "other": Chooser(other, 8, "other")}
    found = key_words(losses, "own", choosers, by_hash([text]), 2.0)
    assert {row["chooser"] for row in found["rows"]} == {"other"}
    assert found["left_out"] == ["me is the measured run, which may not choose its own key words."]


def test_a_chooser_that_gains_at_random_does_not_flatter_others():
    """Chosen by another model's luck, words cost the average; chosen by its own, a model would gain."""
    generator = np.random.default_rng(0)
    text = " ".join("".join(generator.choice(list("abc"), size=4)) for _ in range(800))
    one, other = losses_of_text([text], seed=1), losses_of_text([text], seed=2)
    words = word_of_target(one, by_hash([text]))

    def gain(losses, chosen):
        return float((losses.nats[2] - losses.nats[8])[chosen].mean())

    assert abs(gain(one, key_targets(Chooser(other, 8, "other"), words, 2.0))) < 0.2
    assert gain(one, key_targets(Chooser(one, 8, "one"), words, 2.0)) > 0.5
