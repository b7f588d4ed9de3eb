"""Where a training step spends a GPU's time, by kernel, and the least that the same device needs for it.

Kernels are told apart by name, those of the loss by the range of the host in which they were launched. The
floors are measured in the same process: the model's matrix products alone, the attention kernel alone, and
the least traffic of the rest at the speed of a copy.

Shapes: N tokens, I inputs and O outputs of a product, B batch, T tokens of a row, H query heads, K key-value
heads, D head dimension.
"""

import json
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from benchmark_attention import Stopwatch
from benchmark_layer import copy_bytes_per_second
from torch import Tensor
from training_entrants import Shape

from windowlm.attention.dispatch import attention
from windowlm.attention.window import Visibility
from windowlm.evaluation.precision import WEIGHT_DTYPES, compute_dtype

# The first that matches: kernels of attention and of products may carry the name of one library.
GROUPS_BY_NAME = (
    ("attention", re.compile(r"flash|fmha|flex_att|attention|attn|query_gradient|key_value_gradient", re.I)),
    ("attention", re.compile(r"^forward_kernel")),
    ("products", re.compile(r"nvjet|cutlass|cublas|gemm|xmma|splitk|gemv|triton_tem_fused|triton_mm", re.I)),
    ("loss", re.compile(r"softmax|nll_loss|cross_entropy", re.I)),
)
# Fused by the compiler, named after operations whose results they only read or move.
POINTWISE = re.compile(r"^triton_(poi|per|red|for)_fused(?!.*flex_attention)")
LOSS_GRADIENT = re.compile(r"evaluate_function: .*(CrossEntropy|NllLoss|LogSoftmax)")
GROUPS = ("products", "attention", "loss", "rest")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LARGEST = 20
Event = dict[str, Any]


def profiled(step: Callable[[], Any], steps: int, loss_range: str) -> dict[str, Any]:
    """`breakdown` of some steps, and the milliseconds of one step while nothing is recorded."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    wall_ms = (time.perf_counter() - started) * 1e3 / steps
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return breakdown(events, steps, loss_range, wall_ms)


def breakdown(events: Iterable[Event], steps: int, loss_range: str, wall_ms: float) -> dict[str, Any]:
    """Milliseconds a step of each group of kernels.

    Args:
        events: of a Chrome trace as torch.profiler writes it, times in microseconds.
        steps: steps that it holds.
        loss_range: name of the range in which the loss launches its kernels.
        wall_ms: of a step without the profiler, which slows the host: what the device is not busy of it is
            gaps.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    launches = {
        event["args"]["correlation"]: event
        for event in whole
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    ranges = [
        event
        for event in whole
        if (event.get("cat") == "user_annotation" and event["name"] == loss_range)
        or (event.get("cat") == "cpu_op" and LOSS_GRADIENT.search(event["name"]))
    ]
    spent: dict[tuple[str, str], float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    spans = []
    for event in whole:
        if event.get("cat") not in ON_DEVICE:
            continue
        launch = launches.get(event.get("args", {}).get("correlation"))
        in_loss = launch is not None and any(_holds(each, launch) for each in ranges)
        group = group_of(event["name"], in_loss)
        spent[group, event["name"]] += event["dur"]
        counts[group] += 1
        spans.append((event["ts"], event["ts"] + event["dur"]))
    per_step = 1e-3 / steps
    groups = {
        name: {
            "ms": sum(us for (group, _), us in spent.items() if group == name) * per_step,
            "kernels": counts[name] / steps,
        }
        for name in GROUPS
    }
    busy_ms = _covered(spans) * per_step
    largest = sorted(spent.items(), key=lambda item: -item[1])[:LARGEST]
    return {
        "wall_ms": wall_ms,
        "busy_ms": busy_ms,
        "groups": {**groups, "gaps": {"ms": max(wall_ms - busy_ms, 0.0), "kernels": 0}},
        "largest": [
            {"group": group, "name": name[:120], "ms": us * per_step} for (group, name), us in largest
        ],
    }


def group_of(kernel: str, in_loss: bool) -> str:
    """Which part of the step a kernel belongs to; products stay products in the loss."""
    matching = (group for group, pattern in GROUPS_BY_NAME if pattern.search(kernel))
    if POINTWISE.search(kernel):
        matching = (group for group in matching if group == "loss")
    found = next(matching, "rest")
    return "loss" if in_loss and found == "rest" else found


def _holds(span: Event, launch: Event) -> bool:
    """Whether a range of the host holds a launch: on the same thread, at that time."""
    same_thread = (span.get("pid"), span.get("tid")) == (launch.get("pid"), launch.get("tid"))
    inside: bool = span["ts"] <= launch["ts"] <= span["ts"] + span["dur"]
    return same_thread and inside


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union: kernels of two streams may run at once."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def floors_of(shape: Shape, precision: str, device: torch.device) -> dict[str, Any]:
    """The least milliseconds of each group for one step, on this device, and how they come about."""
    dtype, weights = compute_dtype(precision), WEIGHT_DTYPES[precision]
    copied = copy_bytes_per_second(Stopwatch(device))
    products = {
        name: count * product_ms(shape.tokens, inputs, outputs, dtype, device)
        for name, (inputs, outputs, count) in product_shapes(shape).items()
    }
    loss_bytes = 2 * shape.tokens * shape.vocabulary_size * dtype.itemsize
    rest_bytes = least_rest_bytes(shape, dtype.itemsize, weights.itemsize)
    return {
        "products": sum(products.values()),
        "attention": shape.layers * attention_ms(shape, dtype, device),
        "loss": loss_bytes / copied * 1e3,
        "rest": rest_bytes / copied * 1e3,
        "gaps": 0.0,
        "product_ms": products,
        "copy_bytes_per_second": copied,
    }


def product_shapes(shape: Shape) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and number of each matrix product of the model; those of one input are one."""
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "query, key, value": (shape.dim, width + 2 * kv_width, shape.layers),
        "output": (width, shape.dim, shape.layers),
        "gate, up": (shape.dim, 2 * shape.feed_forward_dim, shape.layers),
        "down": (shape.feed_forward_dim, shape.dim, shape.layers),
        "head": (shape.dim, shape.vocabulary_size, 1),
    }


def product_ms(tokens: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> float:
    """Milliseconds of one product: forward, gradient of the input, gradient of the weight."""
    input_NI = torch.randn(tokens, inputs, device=device, dtype=dtype)
    weight_OI = torch.randn(outputs, inputs, device=device, dtype=dtype)
    gradient_NO = torch.randn(tokens, outputs, device=device, dtype=dtype)
    works: tuple[Callable[[], Tensor], ...] = (
        lambda: input_NI @ weight_OI.mT,
        lambda: gradient_NO @ weight_OI,
        lambda: gradient_NO.mT @ input_NI,
    )
    return sum(median_ms(work, device) for work in works)


def attention_ms(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Milliseconds of the attention of one layer, forward and backward, by the backend that a run takes."""

    def normal(heads: int) -> Tensor:
        size = (shape.batch, shape.sequence_length, heads, shape.head_dim)
        return torch.randn(size, device=device, dtype=dtype)

    query_BTHD, gradient_BTHD = normal(shape.heads).requires_grad_(), normal(shape.heads)
    key_BTKD, value_BTKD = (normal(shape.kv_heads).requires_grad_() for _ in range(2))
    visibility = Visibility.build(window=shape.window)

    def forward() -> Tensor:
        return attention(query_BTHD, key_BTKD, value_BTKD, visibility)

    output_BTHD = forward()

    def backward() -> object:
        inputs = (query_BTHD, key_BTKD, value_BTKD)
        return torch.autograd.grad(output_BTHD, inputs, gradient_BTHD, retain_graph=True)

    return median_ms(forward, device) + median_ms(backward, device)


def least_rest_bytes(shape: Shape, itemsize: int, weight_itemsize: int) -> int:
    """Bytes that what is neither product, attention nor loss cannot do without, if all that can be is fused.

    Numbers a token and layer: each of two norms with its residual reads and writes two streams forward, and
    reads three and writes one backward; rotation reads and writes queries and keys, both ways; the gated MLP
    reads two and writes one forward, reads three and writes two backward. The embedding is read and written,
    and its gradient read. AdamW reads weight, gradient and two moments and writes all but the gradient; its
    norm reads the gradient once more. Under autocast weights are read, and written in the dtype of products.
    """
    numbers = shape.tokens * (
        shape.layers
        * (16 * shape.dim + 4 * (shape.heads + shape.kv_heads) * shape.head_dim + 8 * shape.feed_forward_dim)
        + 3 * shape.dim
    )
    parameters = sum(inputs * outputs * count for inputs, outputs, count in product_shapes(shape).values())
    cast = 0 if itemsize == weight_itemsize else itemsize + weight_itemsize
    return numbers * itemsize + parameters * (8 * weight_itemsize + cast)


def median_ms(work: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of a call, warm."""
    rounds = 20 if device.type == "cuda" else 3
    for _ in range(3):
        work()
    spent = []
    for _ in range(rounds):
        if device.type != "cuda":
            started = time.perf_counter()
            work()
            spent.append((time.perf_counter() - started) * 1e3)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end))
    return statistics.median(spent)
