"""Settings are checked when made, with the key to change, and without loading torch."""

import subprocess
import sys
from typing import Any

import pytest

from windowlm.attention.config import LinearScaling, Llama3Scaling, NtkScaling, RotaryConfig, YarnScaling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", 1.0),
        ("base", float("nan")),
        ("base", float("inf")),
        ("base", 10**400),
        ("base", True),
        ("base", "1e4"),
        ("fraction", 0.0),
        ("fraction", 1.5),
        ("fraction", True),
        ("fraction", float("nan")),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.*; try {field}=\d+$"):
        RotaryConfig(**{field: value})


def test_the_settings_load_without_torch() -> None:
    program = "import sys, windowlm.attention.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("scaling", [{"kind": "linear", "factor": 4.0}, "yarn", 4.0, LinearScaling])
def test_a_scaling_that_is_none_of_the_known_is_refused(scaling: Any) -> None:
    with pytest.raises(ValueError, match=r"^scaling=.*: a LinearScaling, .* is allowed; try scaling="):
        RotaryConfig(scaling=scaling)


YARN = {"kind": "yarn", "factor": 2.0, "original_length": 64}


@pytest.mark.parametrize(
    ("scaling", "settings", "message"),
    [
        *(
            (LinearScaling, {"kind": "linear", "factor": factor}, rf"factor={factor!r}: .*; try factor=1")
            for factor in (0.5, float("nan"), float("inf"), True, "4", None)
        ),
        (LinearScaling, {"kind": "yarn", "factor": 2.0}, r"kind='yarn': 'linear' .*; try kind=linear"),
        (NtkScaling, {"kind": "ntk", "factor": float("nan")}, r"factor=nan: .*; try factor=1"),
        *(
            (YarnScaling, {**YARN, "original_length": length}, rf"original_length={length!r}: .*=1")
            for length in (0, 100.5, True)
        ),
        (YarnScaling, {**YARN, "fast": float("inf")}, "fast=inf: .*; try fast=32"),
        (YarnScaling, {**YARN, "slow": float("nan")}, "slow=nan: .*; try slow=1"),
        (YarnScaling, {**YARN, "truncate": 0}, "truncate=0: .*; try truncate=true"),
        *(
            (
                YarnScaling,
                {**YARN, "attention_factor": given},
                r"attention_factor=.*; try attention_factor=null",
            )
            for given in (0, -1.0, float("nan"), True)
        ),
        (YarnScaling, {**YARN, "mscale": 1.0}, "mscale=1.0: it needs mscale_all_dim .*; try mscale=null"),
        (YarnScaling, {**YARN, "mscale_all_dim": 1.0}, "mscale_all_dim=1.0: it needs mscale .*=null"),
        (
            YarnScaling,
            {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 2.0},
            "attention_factor=2.0: mscale=1.0 .*; try attention_factor=null",
        ),
        (Llama3Scaling, {"kind": "llama3", "slow": 5.0}, r"slow=5\.0: .*; try slow=1"),
        (Llama3Scaling, {"kind": "llama3", "fast": 0.5}, r"slow=1\.0: .*; try slow=0\.25"),
    ],
)
def test_scalings_out_of_range_are_refused_by_name(
    scaling: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        scaling(**settings)
