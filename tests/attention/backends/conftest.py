"""Settings shared by the tests of the backends."""

import pytest

from windowlm.attention.backends import banded


@pytest.fixture(autouse=True)
def cut_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are cut as many are."""
    monkeypatch.setattr(banded, "FEW_TOKENS", 0)
