"""One token at a time from tensors of fixed shape: the logits of one call."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.model.step_logits import Logits
from tests.model.test_streaming import LAYERS, LENGTH, assert_same, drawn, packed
from tests.model.test_switches import tokens
from windowlm.attention.document_layout import PADDING
from windowlm.attention.step_cache import StepCache
from windowlm.generation import token_step
from windowlm.generation.token_step import TokenStep, holds_sinks, joined_view
from windowlm.model.decoder import Decoder

PROMPT = 41
each_layers = pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)


@torch.no_grad()
def stepped(
    model: Decoder,
    tokens_BT: torch.Tensor,
    prompt: int,
    documents_BT: torch.Tensor | None = None,
    *,
    compiled: bool = False,
    recorded: bool = False,
) -> torch.Tensor:
    """Logits of the tokens behind the prompt."""
    cache = model.new_cache(tokens_BT.shape[1])
    model(tokens_BT[:, :prompt], None if documents_BT is None else documents_BT[:, :prompt], cache=cache)
    assert holds_sinks(cache)
    how = {"compiled": compiled, "recorded": compiled or recorded}
    step = TokenStep(joined_view(model), cache, len(tokens_BT), Logits(), **how)
    return torch.stack([step(tokens_B).clone() for tokens_B in tokens_BT[:, prompt:].T], 1)


@each_layers
@pytest.mark.parametrize("prompt", [12, PROMPT])
def test_logits_are_those_of_one_call(layers: dict[str, object], prompt: int) -> None:
    model, tokens_BT = drawn(layers).double(), tokens(2, LENGTH)
    with torch.no_grad():
        whole_BTV = model(tokens_BT)
    assert_same(stepped(model, tokens_BT, prompt), whole_BTV[:, prompt:])


@each_layers
def test_packed_and_padded_rows_are_those_of_one_call(layers: dict[str, object]) -> None:
    model, tokens_BT, documents_BT = drawn(layers).double(), tokens(4, LENGTH), packed()
    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)
    got_BTV = stepped(model, tokens_BT, PROMPT, documents_BT)
    assert_same(got_BTV, whole_BTV[:, PROMPT:])


def test_a_document_goes_on_behind_padding() -> None:
    model, tokens_BT = drawn(LAYERS["all"] | {"attention_sinks": 3}).double(), tokens(2, LENGTH)
    documents_BT = torch.zeros(2, LENGTH, dtype=torch.int64)
    documents_BT[0, 38:PROMPT] = PADDING
    documents_BT[1, : PROMPT - 1] = PADDING
    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)
    assert_same(stepped(model, tokens_BT, PROMPT, documents_BT), whole_BTV[:, PROMPT:])


@pytest.mark.parametrize("rows_differ", [False, True])
def test_a_step_is_one_graph_whatever_the_column(rows_differ: bool) -> None:
    torch.compiler.reset()
    model, tokens_BT = drawn(LAYERS["all"]).double(), tokens(4, LENGTH)
    documents_BT = packed() if rows_differ else None
    graphs = CompileCounter()
    compiled = torch.compile(token_step.outcome_after, fullgraph=True, dynamic=False, backend=graphs)
    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)
        cache = model.new_cache(LENGTH)
        model(tokens_BT[:, :PROMPT], None if documents_BT is None else documents_BT[:, :PROMPT], cache=cache)
        step = StepCache(cache)
        got = []
        for tokens_B in tokens_BT[:, PROMPT:].T:
            got.append(compiled(model, tokens_B[:, None].contiguous(), step, Logits()))
            step.place.step()
    assert graphs.frame_count == 1
    assert_same(torch.stack(got, 1), whole_BTV[:, PROMPT:])


def test_a_cache_that_could_grow_or_is_full_is_refused() -> None:
    model, tokens_BT = drawn(LAYERS["a full layer"]), tokens(1, 10)
    with torch.no_grad():
        growing, bounded = model.new_cache(), model.new_cache(11)
        with pytest.raises(ValueError, match="of 0 tokens"):
            StepCache(bounded)
        for cache in (growing, bounded):
            model(tokens_BT, cache=cache)
        with pytest.raises(ValueError, match="without capacity"):
            StepCache(growing)
        step = TokenStep(joined_view(model), bounded, 1, Logits(), compiled=False)
        step(tokens_BT[:, 0])
        with pytest.raises(ValueError, match="full"):
            step(tokens_BT[:, 0])
