"""Shared by all tests: markers, seeds, poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

try:
    from fastbert import _C

    ISAS = _C.isas()
except ImportError:  # the tests of the extension skip themselves
    ISAS = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty gives NaN (integers: their maximum), so that what a kernel forgets to write shows."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The extension runs each instruction set of this machine in turn."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
