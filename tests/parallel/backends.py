"""Every backend under the exchange, on GPUs over NCCL where each process has one, else on the CPU over gloo.

`torchrun --nproc-per-node 2 -m tests.parallel.backends` prints, of each backend and case, the error of its
parts beside that of the plain formula at the same dtype, or why it is refused; and on GPUs the same of a
compiled model. An error is the Euclidean norm of the difference from float64, of the process's part of output
and gradients together, divided by the norm of what is wanted.

Shapes: B batch, T tokens of the whole sequence, L own tokens, H query heads, K key-value heads, D head
dimension.
"""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from windowlm.attention.dispatch import MODULES, attention
from windowlm.attention.document_layout import positions_in_documents
from windowlm.attention.window import Visibility
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.parallel.context_group import ContextGroup
from windowlm.parallel.own_gpu import own_gpu
from windowlm.parallel.processes import Processes
from windowlm.parallel.sequence_shard import shard_visibilities
from windowlm.training.compilation import hidden_states
from windowlm.training.device_batch import prepared_on

BATCH, SHARD, HEADS, KV_HEADS, HEAD_DIM = 2, 320, 4, 2, 64
MODEL: dict[str, Any] = {"layers": 2, "window": 100, "dim": 128, "feed_forward_dim": 128}
VOCABULARY = 50
# Over the error of the plain formula, as of backends alone; gradients of others are rounded once more.
ROOM = 2.0


class Case(NamedTuple):
    """What is visible; documents start at the tokens given, in each row."""

    window: int | None
    sinks: int = 0
    starts: tuple[int, ...] = ()


CASES = {
    "plain": Case(100),
    "one key": Case(1),
    "beyond the neighbour's part": Case(SHARD + 50),
    "no window": Case(None),
    "documents": Case(100, starts=(130, SHARD - 30, SHARD + 200)),
    "documents that start with a part": Case(100, starts=(SHARD,)),
    "sinks": Case(100, sinks=3, starts=(SHARD - 30,)),
}


def main() -> None:
    """Print the errors, of the leader alone."""
    processes = Processes.join()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = own_gpu(device, processes.place, "--nproc-per-node")
    group = ContextGroup.of(device, processes.size)
    found: dict[str, dict[str, Any]] = {name: errors_of(case, group, device) for name, case in CASES.items()}
    if device.type == "cuda":
        found["compiled model"] = {"auto": error_of_model(group, device)}
    all_found = processes.gather(found)
    if processes.leads:
        print(json.dumps({"device": device.type, "processes": all_found}))


def errors_of(case: Case, group: ContextGroup, device: torch.device) -> dict[str, list[float] | str]:
    """Of each backend's parts and of the plain formula, or why the backend is refused."""
    tokens = SHARD * group.size
    documents_BT = positions_BT = None
    if case.starts:
        starts_T = torch.zeros(tokens, dtype=torch.int64).index_fill(0, torch.tensor(case.starts), 1)
        documents_BT = starts_T.cumsum(0).expand(BATCH, -1)
        positions_BT = positions_in_documents(documents_BT)
    whole = Visibility.build(
        window=case.window, sinks=case.sinks, documents_BT=documents_BT, positions_BT=positions_BT
    ).to(device)
    cut = shard_visibilities(
        {case.window: case.sinks}, group, BATCH, tokens, documents_BT=documents_BT, positions_BT=positions_BT
    )
    (seen,) = prepared_on(cut, BATCH, device).values()
    draw = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(BATCH, tokens, heads, HEAD_DIM, generator=draw).to(device)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    ]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # All start from the same rounded numbers.
    tensors = [tensor.to(dtype) for tensor in tensors]
    exact = outcome([tensor.double() for tensor in tensors], whole, "reference")
    wanted = [group.shard(of_all) for of_all in exact]
    plain = error_of([group.shard(of_all) for of_all in outcome(tensors, whole, "reference")], wanted)
    own = [group.shard(tensor) for tensor in tensors]
    errors: dict[str, list[float] | str] = {}
    for backend in MODULES:
        try:
            parts = outcome(own, seen, backend)
        except ValueError as refusal:
            errors[backend] = str(refusal)
            continue
        errors[backend] = [error_of(parts, wanted), plain]
    return errors


def outcome(tensors: list[Tensor], seen: Visibility, backend: str) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    query, key, value = (tensor.detach().clone().requires_grad_() for tensor in tensors[:3])
    output = seen.attend(attention, query, key, value, backend=backend)
    (output * tensors[3]).sum().backward()  # type: ignore[no-untyped-call]
    assert query.grad is not None
    assert key.grad is not None
    assert value.grad is not None
    return [output.detach(), query.grad, key.grad, value.grad]


def error_of(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The norm of the difference over that of what is wanted, of all tensors together."""

    def norm(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensor.double().norm() for tensor in tensors]).norm()

    pairs = zip(found, wanted, strict=True)
    return float(norm([one.double() - other.double() for one, other in pairs]) / norm(wanted))


def error_of_model(group: ContextGroup, device: torch.device) -> list[float]:
    """Of the compiled parts of hidden states in training, and of one process that is not compiled."""
    torch.manual_seed(0)
    config = ModelConfig(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, **MODEL)
    model = Decoder(config, VOCABULARY).to(device)
    tokens_BT = torch.randint(VOCABULARY, (BATCH, SHARD * group.size)).to(device)
    weights_BTD = torch.randn(BATCH, SHARD * group.size, MODEL["dim"]).to(device)
    seen = shard_visibilities({config.window: 0}, group, BATCH, SHARD * group.size)  # type: ignore[dict-item]

    def trained(hidden: Any, given: tuple[Tensor, Tensor], *, rounded: bool, **options: Any) -> list[Tensor]:
        tokens, weights = given
        with torch.autocast("cuda", torch.bfloat16, enabled=rounded):
            output = hidden(tokens, **options)
        (output.to(weights.dtype) * weights).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return [output.detach(), *gradients]

    whole, cut = (tokens_BT, weights_BTD), (group.shard(tokens_BT), group.shard(weights_BTD))
    plain = trained(model.hidden, whole, rounded=True)
    compiled = hidden_states(model, compiled=True)
    parts = trained(compiled, cut, rounded=True, visibilities=prepared_on(seen, BATCH, device))
    parts = [parts[0], *map(group.summed, parts[1:])]
    model.double()
    exact = trained(model.hidden, (tokens_BT, weights_BTD.double()), rounded=False)
    of_both = [[group.shard(states), *gradients] for states, *gradients in (plain, exact)]
    return [error_of(parts, of_both[1]), error_of(*of_both)]


if __name__ == "__main__":
    main()
