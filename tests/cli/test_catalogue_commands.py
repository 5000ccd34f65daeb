"""The commands that list, show and generate, and the help."""

from pathlib import Path

import pytest
from running_sagellm import sagellm

from sagellm import __version__
from sagellm.cluster.named_files import list_clusters, named_cluster_text


@pytest.mark.parametrize(
    "command", [[], ["replay"], ["traces"], ["traces", "generate"], ["clusters"], ["log"], ["log", "replay"]]
)
def test_help_is_there(command: list[str]) -> None:
    finished = sagellm(*command, "--help")
    assert finished.code == 0
    assert finished.out.startswith("Usage: sagellm")


def test_no_command_shows_help() -> None:
    finished = sagellm()
    assert (finished.code, finished.err) == (0, "")
    assert "replay" in finished.out


def test_version() -> None:
    assert sagellm("--version").out == f"sagellm, version {__version__}\n"


def test_clusters() -> None:
    listed = sagellm("clusters", "list").out
    for name in list_clusters():
        assert name in listed
    assert sagellm("clusters", "show", "h200x4-pd").out == named_cluster_text("h200x4-pd")


def test_traces(tmp_path: Path) -> None:
    assert "azure-conv" in sagellm("traces", "list").out
    written = tmp_path / "trace.jsonl"
    assert sagellm("traces", "generate", "poisson", "-n", "20", "--seed", "1", "-o", written).code == 0
    assert sagellm("traces", "generate", "poisson", "-n", "20", "--seed", "1").out == written.read_text()
    described = sagellm("traces", "stats", written)
    assert described.code == 0
    assert "20" in described.out


def test_a_reader_that_goes_away_is_no_error() -> None:
    import subprocess
    import sys

    command = f"{sys.executable} -m sagellm traces generate poisson -n 20000 | head -n 1"
    finished = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert finished.stdout.count("\n") == 1
    assert finished.stderr == ""
