"""A network namespace of its own for a test, and the kernel's SAD and SPD in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns import Namespace, namespaces
from vici_bridge.kernel.kernel import Kernel


@pytest.fixture
def space() -> Iterator[Namespace]:
    """Entered for the whole test."""
    with namespaces(1) as (made,), made.entered():
        yield made


@pytest.fixture
def kernel(space: Namespace) -> Iterator[Kernel]:
    with Kernel() as made:
        yield made
