import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from windowlm.data.packing import UNSCORED
from windowlm.model.config import ModelConfig
from windowlm.model.decoder import Decoder
from windowlm.training.config import OptimizerConfig
from windowlm.training.lightning_module import LanguageModelModule, targets_behind
from windowlm.training.non_finite import NonFiniteError
from windowlm.training.schedule import Budget, FurtherTargets, WindowWarmup

VOCABULARY, LENGTH = 23, 16
SHAPE = ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=16, window=4)


def gradient_of(model: Decoder) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def rows(count: int) -> dict[str, torch.Tensor]:
    """Packed rows with very different numbers of targets."""
    draw = torch.Generator().manual_seed(5)
    tokens_BT = torch.randint(0, VOCABULARY, (count, LENGTH), generator=draw)
    targets_BT = tokens_BT.roll(-1, 1)
    for row in range(count):
        targets_BT[row, 2 + 2 * row :] = UNSCORED
    return {
        "tokens_BT": tokens_BT,
        "targets_BT": targets_BT,
        "documents_BT": torch.zeros(count, LENGTH, dtype=torch.int32),
        "positions_BT": torch.arange(LENGTH).repeat(count, 1),
    }


class Rows(pl.LightningDataModule):
    def __init__(self, batch_size: int, order: list[int]) -> None:
        super().__init__()
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self.next_batch = 0

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        whole = rows(6)
        batches = [{name: tensor[batch] for name, tensor in whole.items()} for batch in self.batches]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def gradient_after_one_step(
    batch_size: int, order: list[int], clip: float | None, further: FurtherTargets | None = None
) -> torch.Tensor:
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=16, window=4),
        VOCABULARY,
    ).double()
    accumulate = 6 // batch_size
    module = LanguageModelModule(
        model,
        OptimizerConfig(gradient_clip=clip),
        Budget(steps=2),
        np.ones(VOCABULARY, dtype=np.int64),
        sequence_length=LENGTH,
        batch_size=batch_size,
        accumulate_batches=accumulate,
        seed=0,
        further_targets=further,
    )
    gradients: list[torch.Tensor] = []
    step = module.optimizer_step

    def recording_step(*arguments: object, **options: object) -> None:
        step(*arguments, **options)  # type: ignore[arg-type]
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()
        )

    module.optimizer_step = recording_step  # type: ignore[method-assign,assignment]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Rows(batch_size, order))
    assert len(gradients) == 1
    return gradients[0]


@pytest.mark.parametrize("further", [None, FurtherTargets(count=2, fraction=0.5)])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(
    clip: float | None, further: FurtherTargets | None
) -> None:
    whole = gradient_after_one_step(6, [0, 1, 2, 3, 4, 5], clip, further)
    for batch_size, order in ((3, [5, 1, 0, 2, 4, 3]), (2, [0, 1, 2, 3, 4, 5]), (1, [3, 5, 4, 2, 1, 0])):
        cut = gradient_after_one_step(batch_size, order, clip, further)
        assert torch.allclose(cut, whole, rtol=1e-9, atol=1e-14)


def test_further_targets_join_the_loss_by_the_same_logits_and_only_while_they_have_weight() -> None:
    torch.manual_seed(0)
    model = Decoder(SHAPE, VOCABULARY).double()
    batch = rows(6)
    logits_BTV = model(batch["tokens_BT"], batch["documents_BT"], batch["positions_BT"])
    nats_BTV = -logits_BTV.log_softmax(-1)
    summed = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        scored = 2 + 2 * row  # targets of this row, all of one document
        for token in range(scored):
            for distance, weight in ((0, 1.0), (1, 0.5), (2, 0.25)):
                if token + distance < min(scored, LENGTH):
                    target = batch["targets_BT"][row, token + distance]
                    summed = summed + weight * nats_BTV[row, token, target]
    (summed / (batch["targets_BT"] != UNSCORED).sum()).backward()
    expected = gradient_of(model)
    whole = gradient_after_one_step(6, list(range(6)), None, FurtherTargets(count=2, fraction=0.5))
    assert torch.allclose(whole, expected, rtol=1e-5, atol=1e-9)
    plain = gradient_after_one_step(6, list(range(6)), None)
    assert not torch.allclose(whole, plain, rtol=1e-2)
    spent = gradient_after_one_step(6, list(range(6)), None, FurtherTargets(count=2, fraction=0.0))
    assert torch.equal(spent, plain)


def test_targets_behind_a_token_are_those_of_its_document() -> None:
    draw = torch.Generator().manual_seed(1)
    targets_BT = torch.randint(0, VOCABULARY, (5, LENGTH), generator=draw)
    targets_BT[torch.rand(5, LENGTH, generator=draw) < 0.2] = UNSCORED
    behind = targets_behind(targets_BT, 3)
    for row, token, number in torch.cartesian_prod(torch.arange(5), torch.arange(LENGTH), torch.arange(3)):
        between = targets_BT[row, token : token + number + 2]
        there = len(between) == number + 2 and bool((between != UNSCORED).all())
        assert behind[number][row, token] == (between[-1] if there else UNSCORED)


def test_the_reported_losses_are_those_of_the_next_token() -> None:
    logged = []
    for further in (None, FurtherTargets(count=3, fraction=1.0)):
        torch.manual_seed(0)
        module = small_module(further_targets=further)
        module.trainer = SimpleNamespace(datamodule=SimpleNamespace())  # type: ignore[assignment]
        moved = module.transfer_batch_to_device(rows(1), torch.device("cpu"), 0)
        trained = module.training_step(moved, 0).detach()
        logged.append((module.train_sums.read().loss(), trained))
    assert logged[0][0] == logged[1][0]
    assert logged[1][1] > logged[0][1]


def test_the_gradient_is_that_of_the_mean_over_targets() -> None:
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(layers=1, dim=16, heads=2, kv_heads=1, head_dim=8, feed_forward_dim=16, window=4),
        VOCABULARY,
    ).double()
    batch = rows(6)
    logits = model(batch["tokens_BT"], batch["documents_BT"], batch["positions_BT"])
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["targets_BT"].flatten(), ignore_index=UNSCORED
    )
    loss.backward()
    expected = gradient_of(model)
    assert torch.allclose(gradient_after_one_step(2, list(range(6)), None), expected, rtol=1e-5, atol=1e-9)


def test_clipping_limits_the_norm_of_the_whole_gradient() -> None:
    assert gradient_after_one_step(2, list(range(6)), 0.01).norm().item() == pytest.approx(0.01, rel=1e-5)


def small_module(**changes: Any) -> LanguageModelModule:
    return LanguageModelModule(
        Decoder(SHAPE, VOCABULARY),
        OptimizerConfig(),
        Budget(steps=1),
        np.ones(VOCABULARY, dtype=np.int64),
        sequence_length=LENGTH,
        batch_size=1,
        accumulate_batches=1,
        seed=0,
        **changes,
    )


def learning_rates(budget: Budget, steps: int, seconds_per_step: float = 0.0) -> list[float]:
    """Share of the peak rate at each of the steps, two batches each, over a budget."""
    module = LanguageModelModule(
        Decoder(SHAPE, VOCABULARY),
        OptimizerConfig(lr=1.0, schedule="cosine", warmup_fraction=0.2, final_lr_fraction=0.0),
        budget,
        np.ones(VOCABULARY, dtype=np.int64),
        sequence_length=LENGTH,
        batch_size=1,
        accumulate_batches=2,
        seed=0,
    )
    module.seconds_per_step = seconds_per_step
    optimizer = torch.optim.SGD(module.parameters(), lr=7.0)
    module.optimizers = lambda: optimizer  # type: ignore[method-assign,assignment]
    rates = []
    for _ in range(steps):
        module.on_train_batch_start(rows(1), 0)
        rates.append(optimizer.param_groups[0]["lr"])
        module.batches_trained += 2
        module.seconds_trained += seconds_per_step
    return rates


@pytest.mark.parametrize(
    ("one", "ten"),
    [
        (Budget(steps=1), Budget(steps=10)),
        (Budget(tokens=2 * LENGTH), Budget(tokens=20 * LENGTH)),
        (Budget(seconds=0.5), Budget(seconds=5.0)),
    ],
)
def test_every_step_is_taken_at_the_rate_of_its_middle(one: Budget, ten: Budget) -> None:
    assert learning_rates(one, 1, 0.5) == pytest.approx([0.5 * (1 + math.cos(math.pi * 0.3 / 0.8))])
    rates = learning_rates(ten, 10, 0.5)
    assert rates[:2] == pytest.approx([0.25, 0.75])
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (step + 0.5) / 8)) for step in range(8)])
    assert min(rates) > 0


def test_a_step_that_outlasts_the_budget_still_learns() -> None:
    assert learning_rates(Budget(seconds=0.1), 1, 60.0)[0] > 0
    assert learning_rates(Budget(tokens=3 * LENGTH), 2)[1] > 0


def test_tables_follow_the_module_to_its_device_and_keep_their_dtype() -> None:
    module = small_module().to(torch.bfloat16).to("meta")
    for table in (module.token_bytes_V, module.pairs_by_position_ST, module.visible_pairs):
        assert table.device.type == "meta"
        assert table.dtype is torch.int64
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}


def test_a_step_reads_nothing_back_from_its_device() -> None:
    """Tensors on the meta device hold no values, so reading one raises; on a GPU it would wait."""
    module = small_module().to("meta")
    weight = torch.zeros(SHAPE.dim, requires_grad=True, device="meta")
    module.hidden_states = lambda tokens_BT, **_: weight.expand(*tokens_BT.shape, -1)
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(next_batch=0))  # type: ignore[assignment]
    optimizer = torch.optim.SGD([weight])
    batch = module.transfer_batch_to_device(rows(2), torch.device("meta"), 0)
    assert batch["visibilities"][module.model.layer_windows[0]].documents.device.type == "meta"
    for number in range(2):
        module.training_step(batch, number).backward()  # type: ignore[no-untyped-call]
        module.configure_gradient_clipping(optimizer)
    assert module.gradient_norm.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        module.train_sums.read().loss()


def test_without_document_masking_a_batch_needs_no_documents_and_padding_changes_nothing() -> None:
    module = small_module(document_masking=False)
    batch = rows(2)
    batch["documents_BT"][1, 10:], batch["positions_BT"][1, 10:] = -1, 0
    batch["targets_BT"][1, 9:] = UNSCORED
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(next_batch=0))  # type: ignore[assignment]
    moved = module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    (visibility,) = moved["visibilities"].values()
    assert visibility.documents is visibility.positions is None
    masked = small_module()
    masked.load_state_dict(module.state_dict())
    masked.trainer = module.trainer
    summed = module.training_step(moved, 0)
    expected = masked.training_step(masked.transfer_batch_to_device(batch, torch.device("cpu"), 0), 0)
    assert summed.item() == pytest.approx(expected.item(), rel=1e-6)
    assert int(module.visible_pairs) == int(masked.visible_pairs)


def test_a_batch_with_padding_has_the_graph_of_one_without_and_its_loss_and_gradient_are_the_same() -> None:
    module = small_module()
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(next_batch=0))  # type: ignore[assignment]
    full, batch = rows(3), rows(3)
    for padded, begin in ((1, 10), (2, 0)):
        batch["documents_BT"][padded, begin:], batch["positions_BT"][padded, begin:] = -1, 0
        batch["targets_BT"][padded, max(begin - 1, 0) :] = UNSCORED
    outcomes = []
    for given in (full, batch):
        shown = module.transfer_batch_to_device(given, torch.device("cpu"), 0)["visibilities"]
        assert not any(visibility.layout.padded for visibility in shown.values())
    moved = module.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    plainly = {"visibilities": module.model.visibilities(batch["documents_BT"], batch["positions_BT"])}
    assert all(visibility.layout.padded for visibility in plainly["visibilities"].values())
    for given in (moved, {**moved, **plainly}):
        module.zero_grad()
        summed = module.training_step(given, 0)
        summed.backward()  # type: ignore[no-untyped-call]
        outcomes.append((summed.detach(), gradient_of(module.model), int(module.visible_pairs)))
        module.visible_pairs.zero_()
    (loss, gradient, pairs), (plain_loss, plain_gradient, plain_pairs) = outcomes
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-7)
    assert pairs == plain_pairs


def test_the_state_of_a_half_filled_row_is_kept() -> None:
    module, other = small_module(), small_module()
    batch = rows(1)
    module.train_sums.add(torch.rand(1, LENGTH), batch["targets_BT"], module.token_bytes_V)
    module.visible_pairs.add_(module._count_pairs(batch))
    module.batches_trained, module.validation_bits_per_byte = 5, 2.5
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert other.train_sums.read().loss() == module.train_sums.read().loss()
    assert int(other.visible_pairs) == int(module.visible_pairs) > 0
    assert (other.batches_trained, other.validation_bits_per_byte) == (5, 2.5)


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    module = small_module()
    module.require_finite_weights()
    with torch.no_grad():
        module.model.blocks[0].feed_forward.up.weight[3, 2] = math.inf  # type: ignore[index]
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.feed_forward\.up\.weight is not finite"):
        module.require_finite_weights()


def test_visible_pairs_are_counted_inside_window_and_document() -> None:
    model = Decoder(ModelConfig(layers=2, window=[3, None]), VOCABULARY)
    module = LanguageModelModule(
        model,
        OptimizerConfig(),
        Budget(steps=1),
        np.ones(VOCABULARY, dtype=np.int64),
        sequence_length=8,
        batch_size=1,
        accumulate_batches=1,
        seed=0,
    )
    batch = {
        "documents_BT": torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]]),
        "positions_BT": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0]]),
    }
    windowed = (1 + 2 + 3 + 3 + 3) + (1 + 2)
    full = (1 + 2 + 3 + 4 + 5) + (1 + 2)
    assert int(module._count_pairs(batch)) == windowed + full


def test_windows_of_a_step_follow_the_budget_and_pairs_follow_them_and_validation_sees_whole_ones() -> None:
    module = LanguageModelModule(
        Decoder(ModelConfig(layers=2, window=[16, None]), VOCABULARY),
        OptimizerConfig(),
        Budget(steps=4),
        np.ones(VOCABULARY, dtype=np.int64),
        sequence_length=LENGTH,
        batch_size=1,
        accumulate_batches=2,
        seed=0,
        window_warmup=WindowWarmup(limits=(4, 8, None), fraction=0.5),
    )
    seen, pairs = [], []
    for batches in range(8):
        module.batches_trained = batches
        moved = module.transfer_batch_to_device(rows(1), torch.device("cpu"), 0)
        seen.append(moved["visibilities"][16].window)
        assert moved["visibilities"][None].window is None
        pairs.append(int(module._count_pairs(moved)))
    assert seen == [4, 4, 8, 8, 16, 16, 16, 16]
    full = LENGTH * (LENGTH + 1) // 2
    assert pairs[::2] == [full + 10 + 12 * 4, full + 36 + 8 * 8, 2 * full, 2 * full]
    module.batches_trained = 0
    module.eval()
    assert module.transfer_batch_to_device(rows(1), torch.device("cpu"), 0)["visibilities"][16].window == 16
