"""The command ``python scripts/show_ring.py``."""

from pathlib import Path

from tests.conftest import run_script


def test_slots_hold_what_the_formula_says(tmp_path: Path) -> None:
    window, sinks, chunks = 4, 2, [3, 4, 1, 9, 1]
    words = ("--window", str(window), "--sinks", str(sinks), "--chunks", *map(str, chunks))
    done = run_script("scripts/show_ring.py", *words, "--out", "ring.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")
    tokens = 0
    for count, line in zip(chunks, done.stdout.splitlines(), strict=True):
        tokens += count
        slots = {
            token if token < sinks else sinks + (token - sinks) % window: token for token in range(tokens)
        }
        assert [int(word) for word in line.split(":")[1].split()] == [slots[slot] for slot in sorted(slots)]


def test_a_mistake_names_the_option(tmp_path: Path) -> None:
    for words, said in ((("--window", "0"), "--window 0"), (("--chunks", "3", "0"), "--chunks 0")):
        done = run_script("scripts/show_ring.py", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert said in done.stderr
    assert not list(tmp_path.iterdir())
