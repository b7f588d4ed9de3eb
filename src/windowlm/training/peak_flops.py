"""Dense peak of matrix products in bfloat16, by device name.

From the vendors' data sheets, without structured sparsity; MFU is model FLOPs/s over this number whatever
the precision, and is printed with it.
"""

import re

import torch

# First match wins, so a more specific name stands before a shorter one.
DENSE_BF16_PEAKS = (
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("GH200", 989e12),
    ("H100", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)

# A slice of a card, or a weaker card of the same name: its peak is not that of the table.
LESS_THAN_THE_NAME = re.compile(r"\b(MIG|Laptop|Max-Q|D)\b")


def dense_bf16_peak(device_name: str) -> float | None:
    """FLOPs/s of the device, None where the table does not know it.

    Whole words are compared: an L40 is no L4.
    """
    if LESS_THAN_THE_NAME.search(device_name):
        return None
    for name, peak in DENSE_BF16_PEAKS:
        if re.search(rf"\b{name}\b", device_name, re.IGNORECASE):
            return peak
    return None


def device_name(device: torch.device) -> str:
    """Name that the driver gives, or ``CPU (n threads)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"
