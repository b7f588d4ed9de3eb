"""Muon and AdamW as one optimizer, against torch's own two."""

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.parallel.processes import run_in_processes
from windowlm.training.muon import MuonAdamW, orthogonalize

MUON = {"momentum": 0.95, "weight_decay": 0.1}
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.95)}


class Small(nn.Module):
    """Matrices of three shapes, two of them of one; an embedding and a norm for AdamW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.RMSNorm(8)
        self.wide, self.narrow, self.square, self.other = (
            nn.Linear(rows, columns, bias=False) for rows, columns in ((8, 20), (20, 8), (8, 8), (8, 8))
        )

    def matrices(self) -> list[Tensor]:
        return [layer.weight for layer in (self.wide, self.narrow, self.square, self.other)]

    def rest(self) -> list[dict[str, object]]:
        return [
            {"params": [self.embedding.weight], "weight_decay": 0.1},
            {"params": [self.norm.weight], "weight_decay": 0.0},
        ]

    def loss(self, step: int) -> Tensor:
        tokens = torch.randint(11, (5,), generator=torch.Generator().manual_seed(step))
        hidden = self.norm(self.embedding(tokens))
        hidden = self.other(self.square(hidden).relu()) + self.narrow(self.wide(hidden).relu())
        return hidden.square().sum()


def optimizer_of(model: Small) -> MuonAdamW:
    return MuonAdamW(model.matrices(), model.rest(), muon_lr=6e-3, **MUON, **ADAMW)  # type: ignore[arg-type]


def train(model: Small, *optimizers: torch.optim.Optimizer, steps: range = range(6)) -> None:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        model.loss(step).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_parameters_become_those_of_torchs_muon_and_adamw() -> None:
    ours, theirs = Small(), Small()
    train(ours, optimizer_of(ours))
    muon = torch.optim.Muon(theirs.matrices(), lr=6e-3, adjust_lr_fn="match_rms_adamw", **MUON)
    train(theirs, muon, torch.optim.AdamW(theirs.rest(), **ADAMW))  # type: ignore[arg-type]
    start = dict(Small().named_parameters())
    for (name, got), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # torch iterates in bfloat16, we do not on a CPU.
        assert (got - wanted).norm() < 0.06 * (wanted - start[name]).norm(), name


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 20), (3, 20, 8), (2, 1, 5)])
def test_singular_values_go_to_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    gradients_MRC = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    orthogonal_MRC = orthogonalize(gradients_MRC)
    left, values, right = torch.linalg.svd(gradients_MRC, full_matrices=False)
    made = left.mT @ orthogonal_MRC @ right.mT
    assert (made.diagonal(dim1=1, dim2=2) > 0.6)[values > 0.1 * values.amax()].all()
    assert torch.linalg.svdvals(orthogonal_MRC).max() < 1.3
    assert torch.allclose(made - torch.diag_embed(made.diagonal(dim1=1, dim2=2)), torch.zeros(()).double())


def test_a_matrix_without_gradient_stays_and_one_of_zeros_gives_no_nan() -> None:
    model = Small()
    optimizer = optimizer_of(model)
    before = model.square.weight.clone()
    model.wide.weight.grad = torch.zeros_like(model.wide.weight)
    optimizer.step()
    assert torch.equal(model.square.weight, before)
    assert model.wide.weight.isfinite().all()


def test_a_checkpoint_goes_on_bit_by_bit() -> None:
    whole, cut = Small(), Small()
    train(whole, optimizer_of(whole))
    first = optimizer_of(cut)
    train(cut, first, steps=range(3))
    file = io.BytesIO()
    torch.save((cut.state_dict(), first.state_dict()), file)
    file.seek(0)
    resumed = Small()
    second = optimizer_of(resumed)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(model_state)
    second.load_state_dict(optimizer_state)
    train(resumed, second, steps=range(3, 6))
    for got, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, wanted)


ROWS_AND_COLUMNS = ((8, 20), (20, 8), (8, 8), (8, 8), (2, 6))


def trained_rows(rank: int) -> list[list[list[float]]]:
    """What four steps make of matrices whose rows three processes share, or of whole ones with rank -1."""
    draw = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ROWS_AND_COLUMNS]
    norm = nn.Parameter(torch.ones(3))
    mesh = None if rank < 0 else init_device_mesh("cpu", (3,))

    def shared(tensor: Tensor) -> Tensor:
        return tensor if mesh is None else distribute_tensor(tensor, mesh, (Shard(0),))

    weights = [nn.Parameter(shared(matrix)) for matrix in matrices]
    optimizer = MuonAdamW(weights, [{"params": [norm]}], muon_lr=6e-3, fused=True, **MUON, **ADAMW)  # type: ignore[arg-type]
    for step in range(4):
        if step == 2:  # one that is left out
            optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
        for weight, matrix in zip(weights, matrices, strict=True):
            weight.grad = shared(torch.randn(matrix.shape, generator=draw, dtype=torch.float64))
        norm.grad = torch.ones(3)
        if step == 3:
            optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
        optimizer.step()
    whole = [weight.full_tensor() if isinstance(weight, DTensor) else weight for weight in weights]
    return [weight.tolist() for weight in whole]


def test_matrices_whose_rows_processes_share_become_the_same() -> None:
    wanted = trained_rows(-1)
    for found in run_in_processes(3, trained_rows):
        for got, alone in zip(found, wanted, strict=True):
            assert np.allclose(got, alone, rtol=1e-12, atol=1e-12)
