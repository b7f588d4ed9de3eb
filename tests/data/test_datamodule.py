"""The data loaders."""

from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.corpus import prepare, settings, write_documents
from windowlm.data.datamodule import DocumentDataModule, EndlessBatches
from windowlm.data.token_store import PreparedData


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("data") / "docs", 30)


@pytest.fixture(scope="module")
def prepared(folder: Path) -> PreparedData:
    return prepare(folder, folder.parent / "cache", validation_fraction=0.2)


def module(folder: Path, prepared: PreparedData, seed: int = 3, **others: Any) -> DocumentDataModule:
    return DocumentDataModule(prepared, settings(folder, folder.parent / "cache", **others), seed)


def batches(data: DocumentDataModule, count: int) -> list[dict[str, torch.Tensor]]:
    return list(islice(data.train_dataloader(), count))


def equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_batches_are_the_same_with_0_1_and_3_workers(folder: Path, prepared: PreparedData) -> None:
    expected = batches(module(folder, prepared, workers=0), 20)
    for workers in (1, 3):
        assert equal(batches(module(folder, prepared, workers=workers), 20), expected)


def test_a_resumed_module_goes_on_at_the_batch_of_its_state_though_workers_read_ahead(
    folder: Path, prepared: PreparedData
) -> None:
    expected = batches(module(folder, prepared), 12)
    stopped = module(folder, prepared, workers=1)
    batches(stopped, 9)
    stopped.next_batch = 5
    resumed = module(folder, prepared, workers=1)
    resumed.load_state_dict(stopped.state_dict())
    assert stopped.state_dict() == {"next_batch": 5}
    assert equal(batches(resumed, 7), expected[5:])


def test_training_goes_on_into_later_epochs(folder: Path, prepared: PreparedData) -> None:
    data = module(folder, prepared)
    per_epoch = -(-len(data.train_sequences) // data.data.rows)
    read = batches(data, 3 * per_epoch)
    assert len(read) == 3 * per_epoch
    assert not equal(read[:2], read[per_epoch : per_epoch + 2])


def test_another_seed_gives_another_order(folder: Path, prepared: PreparedData) -> None:
    assert not equal(
        batches(module(folder, prepared, seed=3), 2), batches(module(folder, prepared, seed=4), 2)
    )


def test_readers_share_the_positions_of_a_batch() -> None:
    whole = list(islice(EndlessBatches(6, start=2), 3))
    for readers in (2, 3):
        parts = [list(islice(EndlessBatches(6, 2, reader, readers), 3)) for reader in range(readers)]
        assert [list(chain(*of_batch)) for of_batch in zip(*parts, strict=True)] == whole


def test_readers_validate_as_many_batches_each_and_every_target_once(
    folder: Path, prepared: PreparedData
) -> None:
    data = settings(folder, folder.parent / "cache", batch_size=4, validation_tokens=None)
    shares = [
        list(DocumentDataModule(prepared, data, 3, reader, readers=4).val_dataloader()) for reader in range(4)
    ]
    assert len({len(share) for share in shares}) == 1
    targets = [target for share in shares for batch in share for target in batch["targets_BT"].flatten()]
    split = prepared.validation
    expected = [int(token) for i in range(len(split)) for token in split.tokens(i)[1:]]
    assert sorted(int(target) for target in targets if target != -100) == sorted(expected)


def test_validation_reads_every_target_of_its_split_once_in_order(
    folder: Path, prepared: PreparedData
) -> None:
    data = module(folder, prepared, validation_tokens=None)
    read = list(data.val_dataloader())
    assert equal(read, list(data.val_dataloader()))
    targets = torch.cat([batch["targets_BT"][batch["targets_BT"] != -100] for batch in read])
    split = prepared.validation
    expected = [int(token) for i in range(len(split)) for token in split.tokens(i)[1:]]
    assert targets.tolist() == expected


def test_validation_stops_at_its_number_of_tokens(folder: Path, prepared: PreparedData) -> None:
    data = module(folder, prepared, validation_tokens=100)
    inputs = torch.cat([batch["tokens_BT"].flatten() for batch in data.val_dataloader()])
    assert len(inputs) == 112
    assert len(data.validation_sequences) > 7


@pytest.mark.parametrize("limit", [None, 100])
def test_validation_bytes_are_those_of_the_tokens_it_reads(
    folder: Path, prepared: PreparedData, limit: int | None
) -> None:
    data = module(folder, prepared, validation_tokens=limit)
    read = b"".join(data.validation_bytes())
    whole = "".join(prepared.validation.text(i) for i in range(len(prepared.validation))).encode()
    if limit is None:
        assert read == whole
    else:
        # 113 tokens: 112 inputs and the last target, less the end marks among them.
        ends = prepared.validation.lengths.cumsum()
        assert read == whole[: 113 - int((ends <= 113).sum())]
