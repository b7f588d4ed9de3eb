"""Nats of the target tokens."""

import math

import numpy as np
import pytest
import torch

from windowlm.errors import UserError
from windowlm.evaluation import token_loss
from windowlm.evaluation.precision import scoring
from windowlm.evaluation.targets import choose_targets, naive_windows, protocol_windows
from windowlm.evaluation.token_loss import nats_of_targets, target_nats

from .fakes import ReachModel, UniformModel, one_byte_each, random_documents

CPU = torch.device("cpu")


def nats_of(model, documents, windows, precision="64-true", batch_tokens=64):
    with scoring(model, precision) as scored:
        return target_nats(scored, documents, windows, device=CPU, batch_tokens=batch_tokens)


def regions_of(documents, longest_context):
    return choose_targets(documents, one_byte_each(), longest_context, None).regions


def slow_nats(model, documents, windows):
    """One target at a time from its own context alone: no batch, no padding, no shared window."""
    nats = []
    with scoring(model, "64-true") as scored:
        for window in windows:
            for position in range(window.first, window.end):
                tokens_T = torch.tensor(documents.read(window.document, window.start, position))
                logits_V = scored.head(scored.hidden(tokens_T[None]))[0, -1]
                target = int(documents.read(window.document, position, position + 1)[0])
                nats.append(-torch.log_softmax(logits_V, dim=-1)[target].item())
    return np.array(nats)


@pytest.mark.parametrize("make_windows", [protocol_windows, naive_windows])
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_batched_windows_equal_one_target_at_a_time(make_windows, batch_tokens):
    documents = random_documents([70, 33, 50, 9])
    windows = make_windows(regions_of(documents, 12), 7)
    model = ReachModel(11, reach=5)
    fast = nats_of(model, documents, windows, batch_tokens=batch_tokens)
    np.testing.assert_allclose(fast, slow_nats(model, documents, windows), rtol=0, atol=1e-12)


def test_a_uniform_model_gives_exactly_the_logarithm_of_the_vocabulary_size():
    documents = random_documents([40], vocabulary_size=8191)
    windows = protocol_windows(choose_targets(documents, one_byte_each(8191), 8, None).regions, 8)
    nats = nats_of(UniformModel(8191), documents, windows, precision="32-true")
    np.testing.assert_allclose(nats, math.log(8191), rtol=1e-15)


@pytest.mark.parametrize("make_windows", [protocol_windows, naive_windows])
def test_the_model_sees_the_tokens_before_a_target_and_no_other_document(make_windows):
    documents = random_documents([64, 48, 57], vocabulary_size=10_000)
    model = ReachModel(10_000, reach=3)
    windows = make_windows(choose_targets(documents, one_byte_each(10_000), 16, None).regions, 8)
    nats_of(model, documents, windows, precision="32-true")
    texts = [documents.read(document, 0, 1000).tolist() for document in range(3)]
    rows = [texts[window.document][window.start : window.end] for window in windows]
    longest = max(map(len, rows))
    expected = sorted((row + [0] * (longest - len(row)))[:-1] for row in rows)
    assert sorted(row + [0] * (longest - 1 - len(row)) for row in model.seen) == expected


def test_changing_a_token_leaves_the_nats_of_all_targets_before_it_unchanged():
    before = random_documents([60])
    windows = protocol_windows(regions_of(before, 8), 8)
    after = random_documents([60])
    after._tokens[0][40] = after._tokens[0][40] % 10 + 1
    model = ReachModel(11, reach=30)
    changed = nats_of(model, before, windows) != nats_of(model, after, windows)
    assert not changed[: 40 - 8].any()
    assert changed[40 - 8]


def test_a_windowed_models_nats_do_not_change_once_the_context_exceeds_its_reach():
    documents = random_documents([300, 200])
    model = ReachModel(11, reach=16)
    regions = regions_of(documents, 64)
    by_context = {c: nats_of(model, documents, protocol_windows(regions, c)) for c in (8, 16, 32, 64)}
    np.testing.assert_allclose(by_context[16], by_context[64], rtol=0, atol=1e-12)
    np.testing.assert_allclose(by_context[32], by_context[64], rtol=0, atol=1e-12)
    assert np.abs(by_context[8] - by_context[64]).max() > 1e-3


def test_the_head_in_pieces_equals_the_head_at_once(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 13, dtype=torch.float64)
    hidden_ND, targets_N = torch.randn(50, 6, dtype=torch.float64), torch.randint(13, (50,))
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(head(hidden_ND), targets_N, reduction="none").numpy()
        sizes = []

        def counted(piece_ND):
            sizes.append(len(piece_ND))
            return head(piece_ND)

        monkeypatch.setitem(token_loss.LOGITS_AT_ONCE, "cpu", 13 * 7)
        nats = nats_of_targets(counted, hidden_ND, targets_N)
    assert max(sizes) == 7
    np.testing.assert_allclose(nats, expected, rtol=0, atol=1e-13)


def test_logits_of_float32_lose_nothing_to_their_size():
    head = torch.nn.Identity()
    logits_NV = torch.tensor([[1e4, 1e4 - 2.0], [-1e4, -1e4 - 2.0]])
    nats = nats_of_targets(head, logits_NV, torch.tensor([1, 0]))
    np.testing.assert_allclose(nats, [2 + math.log1p(math.exp(-2)), math.log1p(math.exp(-2))], rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(value):
    with pytest.raises(UserError, match="not finite"):
        nats_of_targets(torch.nn.Identity(), torch.tensor([[value, 0.0]]), torch.tensor([1]))
