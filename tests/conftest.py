"""What holds for every test."""

import hashlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def pytest_configure() -> None:
    """Refuse to test compiled modules whose sources have changed since: they would hide the change."""
    stamp = ROOT / ".compiled-sources.sha256"
    lines = stamp.read_text().splitlines()[1:] if stamp.is_file() else []
    for sha256, _, module in (line.partition("  ") for line in lines):
        source = ROOT / module
        if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != sha256:
            pytest.exit(f"{module} has changed since it was compiled: run `make test`, or `make clean`", returncode=2)
