"""What only a GPU can show: the step of a token is replayed as one graph with the logits of one call."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tests.model.step_logits import Logits
from tests.model.test_streaming import LAYERS, LENGTH, drawn, packed
from tests.model.test_switches import tokens
from windowlm.generation.token_step import TokenStep, joined_view

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

PROMPT = 41


@pytest.mark.parametrize("layers", [LAYERS["windows"], LAYERS["all"]], ids=["windows", "all"])
@pytest.mark.parametrize("rows_differ", [False, True])
def test_replayed_steps_give_the_logits_of_one_call(layers: dict[str, object], rows_differ: bool) -> None:
    torch.compiler.reset()
    model, tokens_BT = drawn(layers).cuda(), tokens(4, LENGTH).cuda()
    documents_BT = packed().cuda() if rows_differ else None
    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)
        cache = model.new_cache(LENGTH)
        model(tokens_BT[:, :PROMPT], None if documents_BT is None else documents_BT[:, :PROMPT], cache=cache)
        step = TokenStep(joined_view(model), cache, len(tokens_BT), Logits())
        got = torch.stack([step(tokens_B).clone() for tokens_B in tokens_BT[:, PROMPT:].T], 1)
    wanted = whole_BTV[:, PROMPT:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.std()))


def test_a_kernel_that_starts_early_waits_for_the_one_before_it() -> None:
    # It lets the next one start only after its own wait, so none starts before the last but one has ended.
    torch.compiler.reset()
    model, tokens_BT = drawn(LAYERS["windows"]).cuda(), tokens(4, PROMPT).cuda()
    with torch.no_grad():
        cache = model.new_cache(LENGTH)
        model(tokens_BT, cache=cache)
        _, codes = run_and_get_code(lambda: TokenStep(joined_view(model), cache, len(tokens_BT), Logits()))
    kernels = [kernel for code in codes for kernel in code.split("async_compile.triton(")[1:]]
    early = [kernel for kernel in kernels if "'launch_pdl': True" in kernel]
    assert bool(early) == (torch.cuda.get_device_capability() >= (9, 0))
    for kernel in early:
        wait, launch = kernel.find("gdc_wait()"), kernel.find("gdc_launch_dependents()")
        assert 0 <= wait < (launch if launch >= 0 else len(kernel)), kernel
