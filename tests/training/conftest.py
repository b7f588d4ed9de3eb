"""Files that cannot grow, as on a full disk."""

import resource
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Limit the size of every file that this process writes from now on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
