"""Shared by the tests of traces."""

from collections.abc import Callable
from pathlib import Path

import pytest

_DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """The path of a file of recorded data; the test is skipped where it is not at hand."""

    def find(name: str) -> Path:
        path = _DATA / name
        if not path.is_file():
            pytest.skip(f"recorded data is not at hand: {name}")
        return path

    return find
