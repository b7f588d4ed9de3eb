"""How the next token is chosen."""

import math

import pytest
import torch

from windowlm.generation.config import SamplingConfig, written_texts
from windowlm.generation.sampling import next_tokens, row_draws
from windowlm.generation.token_choice import NO_TOKEN, Occurrences, TokenChoice

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -0.5, 2.0, 0.0])


def shares(draws: int = 20_000, earlier: list[int] | None = None, **settings: object) -> list[float]:
    """How often each token is chosen, draws spread evenly over [0, 1)."""
    draws_B = torch.arange(draws, dtype=torch.float64) / draws
    config = SamplingConfig(**settings)  # type: ignore[arg-type]
    earlier_BT = torch.tensor([earlier or [NO_TOKEN]]).expand(draws, -1)
    chosen_B = TokenChoice(config, draws_B[:, None], earlier_BT, len(LOGITS))(LOGITS.expand(draws, -1)).tokens
    return (torch.bincount(chosen_B, minlength=len(LOGITS)) / draws).tolist()


def expected(logits: list[float], temperature: float = 1.0) -> list[float]:
    """The distribution, by its definition."""
    weights = [math.exp(logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


OUT = -math.inf
CASES: dict[str, tuple[dict[str, object], list[float]]] = {
    "all": ({}, expected(LOGITS.tolist())),
    "temperature": ({"temperature": 0.5}, expected(LOGITS.tolist(), 0.5)),
    "top-k": ({"top_k": 3}, expected([2, OUT, OUT, 1.5, OUT, 2, OUT])),
    "top-k beyond the vocabulary": ({"top_k": 99}, expected(LOGITS.tolist())),
    # The sorted probabilities are 0.33, 0.33, 0.20, ...: the third is the first to reach 0.7.
    "top-p": ({"top_p": 0.7}, expected([2, OUT, OUT, 1.5, OUT, 2, OUT])),
    "top-p keeps the best": ({"top_p": 1e-9}, [1, 0, 0, 0, 0, 0, 0]),
    "min-p": ({"min_p": 0.5}, expected([2, OUT, OUT, 1.5, OUT, 2, OUT])),
    "greedy": ({"temperature": 0.0}, [1, 0, 0, 0, 0, 0, 0]),
    "in order": ({"top_k": 3, "top_p": 0.3, "temperature": 2.0}, [1, 0, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize(("settings", "distribution"), CASES.values(), ids=CASES)
def test_tokens_come_as_often_as_the_settings_say(
    settings: dict[str, object], distribution: list[float]
) -> None:
    assert shares(**settings) == pytest.approx(distribution, abs=2e-4)


def test_tokens_that_occurred_are_less_probable() -> None:
    bent = [1.0, -2.0, 0.5, 1.5, -0.5, 2.0, 0.0]
    assert shares(earlier=[0, 1, NO_TOKEN], repetition_penalty=2.0) == pytest.approx(expected(bent), abs=2e-4)


def test_a_repetition_window_counts_the_last_tokens_alone() -> None:
    near = shares(earlier=[5, 3, 0, 1], repetition_penalty=2.0, repetition_window=2)
    assert near == shares(earlier=[0, 1], repetition_penalty=2.0)
    assert near != shares(earlier=[5, 3, 0, 1], repetition_penalty=2.0)


@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_occurrences_are_counted_in_the_last_tokens_whatever_came_before(window: int | None) -> None:
    text = torch.randint(5, (2, 20), generator=torch.Generator().manual_seed(0))
    text[1, :4] = NO_TOKEN
    for prompt in (1, 3, 10):
        occurrences = Occurrences(text[:, :prompt], 5, window)
        for length in range(prompt, 20):
            last = text[:, max(0, length - window) if window else 0 : length]
            counts = [[int((row == token).sum()) for token in range(5)] for row in last]
            assert occurrences.counts.tolist() == counts
            occurrences.add(text[:, length])


def test_nats_are_those_of_the_model_whatever_the_settings() -> None:
    draws_BT = torch.full((1, 2), 0.999, dtype=torch.float64)
    config = SamplingConfig(temperature=3.0, top_k=4, repetition_penalty=2.0)
    choose = TokenChoice(config, draws_BT, torch.tensor([[2]]), len(LOGITS))
    for _ in range(2):
        chosen = choose(LOGITS[None])
        wanted = -LOGITS.double().log_softmax(-1)[chosen.tokens]
        torch.testing.assert_close(chosen.numbers, torch.stack([chosen.tokens.double(), wanted]))


def test_draws_depend_on_seed_and_prompt_and_begin_alike() -> None:
    draws = row_draws(3, 7, 100)
    for tokens in (1, 15, 16, 17, 64):
        assert torch.equal(row_draws(3, 7, tokens), draws[:tokens])
    assert not torch.equal(row_draws(4, 7, 100), draws)
    assert not torch.equal(row_draws(3, 8, 100), draws)
    assert bool(((draws >= 0) & (draws < 1)).all())


def test_the_largest_draw_chooses_a_possible_token() -> None:
    nearly_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert next_tokens(LOGITS[None], nearly_one, SamplingConfig(top_k=3)).item() == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-39},
        {"repetition_penalty": 1e39},
        {"repetition_window": 5},
        {"repetition_window": 0},
        {"seed": -1},
        {"seed": 1.5},
        {"seed": None},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"max_new_tokens": 2.5},
        {"max_new_tokens": True},
        {"top_k": 2.5},
        {"min_p": None},
        {"stop_at_end": 1},
        {"stop": None},
        {"stop": [1]},
        {"stop": [""]},
    ],
)
def test_settings_out_of_range_are_refused_with_advice(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}.*; try {next(iter(wrong))}="):
        SamplingConfig(**wrong)  # type: ignore[arg-type]


def test_stop_texts_of_a_command_line_have_line_breaks_and_no_other_escapes() -> None:
    assert written_texts([r"\n\n", "END", r"a\tb\\n"]) == ["\n\n", "END", "a\tb\\n"]
    for wrong in (r"\u0020", r"\q", "\\"):
        with pytest.raises(ValueError, match="behind a backslash n, t, r and another backslash"):
            written_texts([wrong])
