"""Kernels of a step in groups, from a trace as torch.profiler writes it, and floors on the device at hand."""

from typing import Any

import pytest
import torch

from tests.conftest import PROJECT

RANGE = "head and loss"


@pytest.fixture
def breakdown_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PROJECT / "scripts"))
    import step_breakdown

    return step_breakdown


def launched(number: int, kernel: str, host: float, start: float, length: float) -> list[dict[str, Any]]:
    """A launch on the host and its kernel."""
    same = {"ph": "X", "args": {"correlation": number}}
    return [
        {**same, "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1, "ts": host, "dur": 2},
        {**same, "cat": "kernel", "name": kernel, "pid": 0, "tid": 7, "ts": start, "dur": length},
    ]


def test_kernels_go_to_their_groups_and_the_rest_of_the_time_is_gaps(breakdown_module: Any) -> None:
    loss = {"ph": "X", "cat": "user_annotation", "name": RANGE, "pid": 1, "tid": 1, "ts": 100, "dur": 50}
    other_thread = {**loss, "tid": 2, "ts": 0}
    on_device = {**loss, "cat": "gpu_user_annotation", "pid": 0, "tid": 7, "ts": 0, "dur": 9000}
    events = [
        loss,
        other_thread,
        on_device,
        {"ph": "M", "name": "process_name", "pid": 1},
        *launched(1, "nvjet_tst_128x256_64x4", 10, 1000, 300),
        *launched(2, "query_gradient_kernel", 20, 1300, 200),
        *launched(3, "vectorized_elementwise_kernel", 30, 1400, 200),  # half of it beside the one before
        *launched(4, "vectorized_elementwise_kernel", 110, 1700, 100),
        *launched(5, "sm90_xmma_gemm_bf16", 120, 1800, 400),
    ]
    found = breakdown_module.breakdown(events, 2, RANGE, wall_ms=0.7)
    groups = found["groups"]
    assert {name: group["ms"] for name, group in groups.items()} == pytest.approx(
        {"products": 0.35, "attention": 0.1, "loss": 0.05, "rest": 0.1, "gaps": 0.7 - found["busy_ms"]}
    )
    assert found["busy_ms"] == pytest.approx((300 + 300 + 100 + 400) / 2000)
    assert groups["products"]["kernels"] == 1
    assert found["largest"][0] == {
        "group": "products",
        "name": "sm90_xmma_gemm_bf16",
        "ms": pytest.approx(0.2),
    }


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "products"),
        ("triton_tem_fused_mm_3", "products"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_per_fused_flex_attention_backward_1", "attention"),
        ("void flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("kernel_cutlass_flash_attncuteflash_fwd_sm90", "attention"),
        ("forward_kernel", "attention"),
        ("key_value_gradient_kernel", "attention"),
        ("triton_poi_fused_mm_mul_silu_4", "rest"),
        ("triton_red_fused__log_softmax_nll_loss_forward_2", "loss"),
        ("Memcpy HtoD (Pinned -> Device)", "rest"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "rest"),
    ],
)
def test_names_of_kernels(breakdown_module: Any, kernel: str, group: str) -> None:
    assert breakdown_module.group_of(kernel, in_loss=False) == group


def test_floors_cover_every_parameter_of_the_products(breakdown_module: Any) -> None:
    import training_entrants

    from windowlm.model.cost import model_cost

    shape = training_entrants.Shape(
        dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, feed_forward_dim=48, vocabulary_size=256, window=8,
        sequence_length=32, tokens_per_step=64,
    )  # fmt: skip
    parameters = sum(i * o * count for i, o, count in breakdown_module.product_shapes(shape).values())
    cost = model_cost(shape.model_config(), 256, 32, 4)
    assert parameters == cost.matmul_parameters
    floors = breakdown_module.floors_of(shape, "bf16-mixed", torch.device("cpu"))
    assert all(floors[group] > 0 for group in breakdown_module.GROUPS)
    assert floors["products"] == pytest.approx(sum(floors["product_ms"].values()))
    mixed, true = (breakdown_module.least_rest_bytes(shape, 2, itemsize) for itemsize in (4, 2))
    assert mixed - true == parameters * (8 * 2 + 6)
