"""A sandbox for the tests of a module, of each kind that this machine has."""

import pytest
from sandboxes import LIMITS, assert_holds, kinds, processes

from repirl.verify.sandbox import Sandbox


@pytest.fixture(scope="module", params=kinds())
def shared(request):
    with Sandbox(LIMITS, kind=request.param) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(shared):
    """After each test: no process is left, no file, and the next program runs."""
    before = processes(shared)
    yield shared
    assert_holds(shared, before)
