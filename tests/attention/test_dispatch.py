"""Which backend serves a call, what is refused, and that the choice is said once."""

import itertools
import logging
from typing import Any

import pytest
import torch

from windowlm.attention import dispatch
from windowlm.attention.backends.capability import Capabilities, Request
from windowlm.attention.config import BACKENDS
from windowlm.attention.dispatch import attention, choose_backend
from windowlm.attention.window import Visibility


def test_every_named_backend_is_ranked_for_auto() -> None:
    for window, groups in itertools.product((None, 1, 256, 257), (1, 3)):
        assert sorted([*dispatch.fastest_first(window, groups), "auto"]) == sorted(BACKENDS)


@pytest.mark.parametrize(
    ("window", "groups", "fastest"),
    [(128, 1, "band"), (129, 1, "flash4"), (256, 3, "band"), (257, 3, "flash4"), (None, 3, "flash4")],
)
def test_our_tiles_are_ahead_at_small_windows(window: int | None, groups: int, fastest: str) -> None:
    assert dispatch.fastest_first(window, groups)[0] == fastest


def test_auto_takes_the_fastest_that_can_and_says_why_it_passed_over_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    able = dispatch.capabilities("reference")
    unable = Capabilities(**{**vars(able), "dropout": False})
    declared = {"banded": unable, "reference": able}
    monkeypatch.setattr(dispatch, "capabilities", declared.__getitem__)
    monkeypatch.setattr(dispatch, "fastest_first", lambda window, groups: list(declared))
    assert choose_backend("auto", Request()).name == "banded"
    choice = choose_backend("auto", Request(dropout=0.1))
    assert choice.name == "reference"
    assert "not banded: it does not support dropout" in choice.reason
    with pytest.raises(ValueError, match=r"backend='banded' .*not support dropout.*; try backend=reference$"):
        choose_backend("banded", Request(dropout=0.1))


@pytest.mark.parametrize(
    ("limits", "request_", "reason"),
    [
        ({"devices": frozenset({"cuda"})}, {}, "does not run on cpu"),
        ({"dtypes": frozenset({torch.bfloat16})}, {}, "does not compute in torch.float32"),
        ({"head_dim_limit": 32}, {"head_dim": 64}, "head dimensions up to 32"),
        ({"bidirectional": False}, {"causal": False}, "does not support bidirectional"),
        ({"sinks": False}, {"sinks": 4}, "does not support sinks"),
        ({"documents": False}, {"documents": True}, "does not support documents"),
        ({"separate_keys": False}, {"separate_keys": True}, "does not support keys with positions"),
        ({"more_keys": False}, {"more_keys": True}, "does not support more keys than queries"),
        (
            {"torch_versions": ((2, 11), (2, 12))},
            {"torch_version": (2, 13)},
            "torch 2.11 to 2.12, this is 2.13",
        ),
        (
            {"torch_versions": ((2, 11), None)},
            {"torch_version": (2, 10)},
            "2.11 or later, this is 2.10",
        ),
        ({"sink_logits": False}, {"sink_logits": True}, "does not support learned sinks"),
        ({"logit_cap": False}, {"logit_cap": True}, "does not support a cap on the logits"),
        ({"gradients": False}, {"gradients": True}, "does not support gradients"),
        ({"deterministic": False}, {"deterministic": True}, "does not support gradients that are the same"),
        ({"gaps": False}, {"documents": True, "gaps": True}, "does not support padding inside documents"),
        ({"gaps": False}, {"gaps": True, "gaps_known": False}, "unknown where a compiled graph builds"),
        ({"missing": "it needs the package flash-attn-4"}, {}, "needs the package flash-attn-4"),
        ({"head_dim_multiple": 8}, {"head_dim": 20}, "multiples of 8, not 20"),
        ({"head_dim_least": 16}, {"head_dim": 8}, "from 16 on"),
        ({"compute_capability": (9, 0)}, {"compute_capability": (8, 6)}, "9.0 or later, this one has 8.6"),
    ],
)
def test_a_missing_capability_is_refused_with_its_name(
    limits: dict[str, Any], request_: dict[str, Any], reason: str
) -> None:
    everything = {**vars(dispatch.capabilities("reference")), "torch_versions": ((2, 0), None)}
    assert Capabilities(**everything).refusal(Request(**request_)) is None
    refusal = Capabilities(**{**everything, **limits}).refusal(Request(**request_))
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize("compiled", [False, True])
def test_the_choice_is_logged_once(compiled: bool, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._report_once.cache_clear()
    torch.compiler.reset()
    heads = torch.randn(1, 4, 1, 8)
    call = torch.compile(attention, fullgraph=True, backend="eager") if compiled else attention
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        for _ in range(3):
            call(heads, heads, heads, Visibility.build(window=2))
    assert len(caplog.records) == 1
    assert "backend banded, fastest that supports the call" in caplog.text


def test_keys_before_the_first_query_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = {name: dispatch.capabilities(name) for name in dispatch.MODULES}
    declared["banded"] = Capabilities(**{**vars(declared["banded"]), "more_keys": False})
    monkeypatch.setattr(dispatch, "capabilities", declared.__getitem__)
    heads = torch.randn(1, 4, 1, 8)
    attention(heads, heads, heads, Visibility.build(window=2), backend="banded")
    with pytest.raises(ValueError, match="does not support more keys than queries; reference can"):
        attention(heads[:, 2:], heads, heads, Visibility.build(window=2), backend="banded")


def test_the_reason_is_silent_about_backends_of_other_devices() -> None:
    assert "flash4" not in choose_backend("auto", Request(device="cpu")).reason
    assert "not flash4: " in choose_backend("auto", Request(device="cuda", dtype=torch.float64)).reason


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='flush': auto, .* are allowed; try backend=auto"):
        choose_backend("flush", Request())


@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(1, 2, 3, 4), "query has shape"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).double(), "key is torch.float64"),
        (
            torch.ones(1, 2, 3, 4).to(torch.float8_e4m3fn),
            torch.ones(1, 2, 3, 4),
            "query has dtype torch.float8_e4m3",
        ),
        (torch.ones(1, 2, 3, 4).int(), torch.ones(1, 2, 3, 4), "query has dtype torch.int32"),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 2, 4), "3 query heads over 2 key-value heads"),
        (torch.ones(1, 2, 3, 4), torch.ones(2, 2, 3, 4), "give one batch size"),
        (torch.ones(1, 0, 3, 4), torch.ones(1, 0, 3, 4), "sizes from 1 on"),
        (
            torch.ones(1, 2, 3, 4).to_sparse(),
            torch.ones(1, 2, 3, 4),
            r"query is sparse or nested: a dense tensor",
        ),
        (torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4).to_sparse(), r"try key\.to_dense\(\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(query: torch.Tensor, key: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(query, key, key, Visibility.build(window=2))


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 1.0},
        {"dropout": float("nan")},
        {"dropout": "a"},
        {"dropout": False},
        {"scale": float("nan")},
        {"scale": "a"},
        {"scale": True},
        {"scale": 0.0},
        {"scale": -0.5},
        {"scale": 1e-50},
        {"scale": float("inf")},
        {"scale": 10**400},
        {"scale": 10**5000},
        {"logit_cap": -1.0},
        {"logit_cap": "a"},
        {"logit_cap": True},
        {"logit_cap": 0},
        {"logit_cap": 1e-50},
        {"logit_cap": 10**400},
    ],
)
def test_numbers_out_of_range_are_refused_by_name(options: dict[str, Any]) -> None:
    heads = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}="):
        attention(heads, heads, heads, Visibility.build(window=2), **options)


@pytest.mark.parametrize("scale", [1e-20, 1, 1e3])
@pytest.mark.parametrize("window", [2, None])
def test_every_scale_that_is_allowed_is_honoured(scale: float, window: int | None) -> None:
    heads = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(0))
    outputs = [
        attention(heads, heads, heads, Visibility.build(window=window), scale=scale, backend=backend)
        for backend in ("auto", "reference")
    ]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize(("rows", "tokens", "message"), [(2, 4, "2 rows, the call"), (3, 5, "length 5")])
def test_a_visibility_of_another_batch_is_refused(rows: int, tokens: int, message: str) -> None:
    heads = torch.randn(3, 4, 1, 8)
    for window in (2, None):
        documents_BT = torch.zeros(rows, tokens, dtype=torch.int32)
        visibility = Visibility.build(window=window, documents_BT=documents_BT)
        with pytest.raises(ValueError, match=message):
            attention(heads, heads, heads, visibility)


def test_fewer_keys_than_queries_without_positions_are_refused() -> None:
    heads = torch.randn(1, 6, 1, 8)
    for window in (2, None):
        with pytest.raises(ValueError, match="5 keys for 6 queries"):
            attention(heads, heads[:, :5], heads[:, :5], Visibility.build(window=window))


def test_arguments_of_another_kind_are_refused_by_name() -> None:
    heads, visibility = torch.randn(1, 4, 1, 8), Visibility.build(window=2)
    for position, name in enumerate(("query", "key", "value", "visibility")):
        arguments: list[Any] = [heads, heads, heads, visibility]
        arguments[position] = None
        with pytest.raises(ValueError, match=f"^{name} is a NoneType"):
            attention(*arguments)
    with pytest.raises(ValueError, match="sink_logits_H is a list"):
        attention(heads, heads, heads, visibility, sink_logits_H=[0.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sink_logits_H is sparse or nested"):
        attention(heads, heads, heads, visibility, sink_logits_H=torch.zeros(1).to_sparse())


@pytest.mark.parametrize(
    "sink_logits", [torch.zeros(2), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)]
)
def test_sink_logits_that_are_not_one_a_head_are_refused(sink_logits: torch.Tensor) -> None:
    heads = torch.randn(1, 4, 1, 8)
    with pytest.raises(ValueError, match="sink_logits_H has shape"):
        attention(heads, heads, heads, Visibility.build(window=2), sink_logits_H=sink_logits)
