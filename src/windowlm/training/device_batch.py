"""A batch on its device, with what the layers may see made on the host, which need not wait for a GPU."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from windowlm.attention.window import move_together
from windowlm.data.packing import PADDING
from windowlm.model.decoder import Decoder, Visibilities


def shown_to_layers(batch: Mapping[str, torch.Tensor], document_masking: bool) -> dict[str, torch.Tensor]:
    """What of a training batch the layers' visibilities are made from.

    The padding of each row is one more document, so that all batches have one graph: nothing that the layers
    compute of it is scored, and no token of text sees it.

    Args:
        batch: `tokens_BT`; `documents_BT`, -1 for padding, which stands behind the text; `positions_BT`.
        document_masking: False where each row is one document.
    """
    if not document_masking:
        return {"tokens_BT": batch["tokens_BT"]}
    documents_BT = batch["documents_BT"]
    padding_BT = documents_BT == PADDING
    index_T = torch.arange(documents_BT.shape[1])
    next_B1 = documents_BT.amax(1, keepdim=True) + 1
    return {
        **batch,
        "documents_BT": torch.where(padding_BT, next_B1, documents_BT),
        "positions_BT": torch.where(padding_BT, index_T, batch["positions_BT"]),
    }


def visibilities_on(
    model: Decoder, batch: Mapping[str, Any], device: torch.device, window_limit: int | None = None
) -> Visibilities:
    """What each window of the model shows in a batch that lies on the CPU.

    Args:
        model: the decoder.
        batch: without ``documents_BT`` and ``positions_BT`` each sequence is one document.
        device: where the batch will be.
        window_limit: no window shows more keys; None for no limit.
    """
    visibilities = model.visibilities(
        batch.get("documents_BT"), batch.get("positions_BT"), window_limit=window_limit
    )
    return prepared_on(visibilities, len(batch["tokens_BT"]), device)


def prepared_on(visibilities: Visibilities, batch: int, device: torch.device) -> Visibilities:
    """Visibilities that lie on the CPU, on the device, with what its kernels read of the rows of a batch."""
    if device.type == "cpu":
        return visibilities
    for visibility in visibilities.values():
        visibility.prepare(batch)

    return move_together(visibilities, partial(moved_without_waiting, device=device))


def moved_without_waiting(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on the device, which copies it while the host goes on."""
    # Rows that were expanded from one cannot be pinned.
    tensor = tensor.contiguous().pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)
