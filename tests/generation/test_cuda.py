"""What only a GPU can show: the step of a token is replayed as one graph with the logits of one call."""

import copy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from tests.interchange.models import random_decoder
from tests.model.step_logits import Logits
from tests.model.test_streaming import LAYERS, LENGTH, drawn, packed
from tests.model.test_switches import tokens
from tests.model.test_token_step import PROMPT, stepped
from windowlm.bundle import Bundle
from windowlm.generation import split_products
from windowlm.generation.config import SamplingConfig
from windowlm.generation.generate import Generator
from windowlm.generation.prompt_reader import PromptReader
from windowlm.generation.split_products import gated_product_by_kernel, product_by_kernel
from windowlm.generation.token_step import TokenStep, joined_view
from windowlm.tokenization.tokenizer import BytesTokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("layers", [LAYERS["windows"], LAYERS["all"]], ids=["windows", "all"])
@pytest.mark.parametrize("rows_differ", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_steps_give_the_logits_of_one_call(
    layers: dict[str, object], rows_differ: bool, compiled: bool
) -> None:
    torch.compiler.reset()
    model, tokens_BT = drawn(layers).cuda(), tokens(4, LENGTH).cuda()
    documents_BT = packed().cuda() if rows_differ else None
    with torch.no_grad():
        whole_BTV = model(tokens_BT, documents_BT)
    got = stepped(model, tokens_BT, PROMPT, documents_BT, compiled=compiled, recorded=True)
    wanted = whole_BTV[:, PROMPT:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5 * float(wanted.std()))


@pytest.mark.parametrize("layers", [LAYERS["windows"], LAYERS["all"]], ids=["windows", "all"])
@pytest.mark.parametrize("rows_differ", [False, True])
def test_prompts_that_a_graph_reads_err_no_more_than_twice_as_much(
    layers: dict[str, object], rows_differ: bool
) -> None:
    torch.compiler.reset()
    exact, tokens_BT = drawn(layers).cuda(), tokens(4, LENGTH).cuda()
    model = copy.deepcopy(exact).bfloat16()
    documents_BT = packed().cuda() if rows_differ else None
    states: list[torch.Tensor] = []
    for tried, compiled in ((exact, False), (model, False), (model, True)):
        cache, reader = tried.new_cache(LENGTH), PromptReader(tried, compiled=compiled)
        of_chunks = [
            reader(tokens_BT[:, columns], None if documents_BT is None else documents_BT[:, columns], cache)
            for columns in (slice(0, PROMPT), slice(PROMPT, LENGTH))
        ]
        states.append(torch.stack(of_chunks).float())
    wanted, plain, fast = states
    assert (fast - wanted).norm() <= 2 * (plain - wanted).norm()
    assert counters["stats"]["unique_graphs"] > 0


def test_no_kernel_of_inductor_starts_early() -> None:
    # They would read what the kernel in front writes in place before they wait for it.
    torch.compiler.reset()
    model, tokens_BT = drawn(LAYERS["windows"]).cuda(), tokens(4, PROMPT).cuda()
    with torch.no_grad():
        cache = model.new_cache(LENGTH)
        model(tokens_BT, cache=cache)
        _, codes = run_and_get_code(lambda: TokenStep(joined_view(model), cache, len(tokens_BT), Logits()))
    assert any("async_compile.triton(" in code for code in codes)
    assert not any("'launch_pdl': True" in code for code in codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(50, 100), (768, 2048), (1280, 768), (4097, 769)])
@pytest.mark.parametrize("rows", [2, 3, 17, 64, 128])
def test_a_split_product_is_the_product(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Every other number of a row, and weights that are part of wider ones.
    row_RK = torch.randn(rows, 2 * inputs, device="cuda", dtype=dtype)[:, ::2]
    weight_NK = (torch.randn(outputs, inputs + 8, device="cuda") / inputs**0.5).to(dtype)[:, :inputs]
    part_PRN = product_by_kernel(row_RK, weight_NK)
    wanted_RN = row_RK.double() @ weight_NK.double().T
    error = (part_PRN.double().sum(0) - wanted_RN).abs().max()
    assert error <= 1e-5 * wanted_RN.abs().max()
    assert torch.equal(part_PRN, product_by_kernel(row_RK, weight_NK))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("gated", "inputs"), [(25, 100), (16, 256), (2048, 768), (1537, 1025)])
@pytest.mark.parametrize("rows", [2, 3, 17, 64, 128])
def test_a_gated_product_is_what_follows_from_its_halves(
    rows: int, gated: int, inputs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    row_RK = torch.randn(rows, 2 * inputs, device="cuda", dtype=dtype)[:, ::2]
    weight_NK = (torch.randn(2 * gated, inputs + 8, device="cuda") / inputs**0.5).to(dtype)[:, :inputs]
    output_RF = gated_product_by_kernel(row_RK, weight_NK)
    gate_RF, up_RF = (row_RK.double() @ weight_NK.double().T).chunk(2, 1)
    wanted_RF = torch.nn.functional.silu(gate_RF) * up_RF
    rounded = torch.finfo(dtype).eps / 2 * wanted_RF.abs()
    assert bool(((output_RF - wanted_RF).abs() <= rounded + 1e-5 * wanted_RF.abs().max()).all())
    assert torch.equal(output_RF, gated_product_by_kernel(row_RK, weight_NK))


@pytest.mark.parametrize("fewest", [1, split_products.FEWEST_GATED_PROGRAMS])
def test_the_steps_of_a_batch_take_split_products_and_one_row_takes_none(
    fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_products, "FEWEST_GATED_PROGRAMS", fewest)
    model = drawn(LAYERS["windows"]).bfloat16().cuda()
    exact_model = copy.deepcopy(model).double()
    for batch in (1, 4):
        torch.compiler.reset()
        tokens_BT, logits = tokens(batch, LENGTH).cuda(), []
        for compiled in (False, True):
            took, codes = run_and_get_code(lambda: stepped(model, tokens_BT, PROMPT, compiled=compiled))  # noqa: B023
            logits.append(took)
        assert any("split_products.product" in code for code in codes) == (batch > 1)
        gated = batch > 1 and fewest == 1
        assert any("split_products.gated_product" in code for code in codes) == gated
        with torch.no_grad():
            exact = exact_model(tokens_BT)[:, PROMPT:]
        slow, fast = (float((took - exact).abs().max()) for took in logits)
        assert fast <= 2 * slow


def test_the_next_steps_of_a_batch_compile_nothing() -> None:
    torch.compiler.reset()
    counters.clear()
    model = drawn(LAYERS["windows"]).bfloat16().cuda()
    for count, batch in ((1, 1), (2, 4), (2, 1), (2, 4)):
        stepped(model, tokens(batch, LENGTH).cuda(), PROMPT, compiled=True)
        assert counters["stats"]["unique_graphs"] == count


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_of_replayed_steps_is_that_of_steps_launched_one_by_one(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = BytesTokenizer()
    model = random_decoder(vocabulary_size=tokenizer.vocabulary_size).double().cuda()
    bundle = Bundle(model, tokenizer, {"sequence_length": 2**20}, Path())
    filters = {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "repetition_window": 16}
    settings = SamplingConfig(max_new_tokens=40, temperature=temperature, stop_at_end=False, **filters)
    replays: list[None] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(replay(graph)))
    recorded = Generator(bundle, settings).batch(["one", "another"])
    assert len(replays) == 39
    # A hook must be called for each token.
    calls: list[None] = []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(None))
    launched = Generator(bundle, settings).batch(["one", "another"])
    assert (len(replays), len(calls)) == (39, 40)
    assert [result.tokens for result in recorded] == [result.tokens for result in launched]
