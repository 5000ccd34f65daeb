"""Compiled or interpreted, a run is the same run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARGUMENTS = ["replay", "azure-conv", "--limit", "300", "--rate", "60", "--cluster", "h200x4-pd"]


def log_sha256(tree: Path, output: Path) -> str:
    """Of a run by the packages in ``tree``."""
    subprocess.run(
        [sys.executable, "-m", "sagellm", *ARGUMENTS, "--json", str(output)],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        capture_output=True,
    )
    return str(json.loads(output.read_text())["runs"][0]["log_sha256"])


def test_compiled_and_interpreted_runs_have_the_same_log(tmp_path: Path) -> None:
    if not (ROOT / ".compiled-sources.sha256").is_file():
        pytest.skip("the modules are not compiled in place")
    pure = tmp_path / "pure"
    for package in ("sagellm", "sim", "backends", "traces"):
        shutil.copytree(ROOT / package, pure / package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    assert log_sha256(pure, tmp_path / "pure.json") == log_sha256(ROOT, tmp_path / "compiled.json")
