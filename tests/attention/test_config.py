"""Settings are checked when made, with the key to change, and without loading torch."""

import subprocess
import sys

import pytest

from windowlm.attention.config import LinearScaling, Llama3Scaling, RotaryConfig, YarnScaling


@pytest.mark.parametrize(
    ("field", "value"), [("base", 1.0), ("base", float("nan")), ("fraction", 0.0), ("fraction", 1.5)]
)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.*; try {field}=\d+$"):
        RotaryConfig(**{field: value})


def test_the_settings_load_without_torch() -> None:
    program = "import sys, windowlm.attention.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_scalings_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^factor=0\.5: .*; try factor=1$"):
        LinearScaling(kind="linear", factor=0.5)
    with pytest.raises(ValueError, match=r"^original_length=0: .*; try original_length=1$"):
        YarnScaling(kind="yarn", factor=2.0, original_length=0)
    with pytest.raises(ValueError, match=r"^slow=5\.0: .*; try slow=1$"):
        Llama3Scaling(kind="llama3", slow=5.0)
