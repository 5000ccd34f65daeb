"""``sagellm`` as a user runs it."""

import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from sagellm.cli import main

# A cluster file on the spec sheet of an H200: quick to read, and there whatever has been measured.
CLUSTER_TEXT = """\
name: {name}
model: Qwen/Qwen2.5-7B
instances:
  - {{device: h200, count: {count}}}
slo: {{ttft: 500ms, tpot: 50ms}}
"""


@dataclass(frozen=True, slots=True)
class Finished:
    code: int
    out: str
    err: str


def sagellm(*arguments: str | Path, cwd: Path | None = None) -> Finished:
    """Run the command line in this process, which saves starting Python anew for every test."""
    with (
        chdir(cwd or Path.cwd()),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as left,
    ):
        main([str(argument) for argument in arguments])
    return Finished(left.value.code or 0, out.getvalue(), err.getvalue())


def sagellm_in_a_process(*arguments: str | Path) -> Finished:
    """Run it as a user does."""
    command = [sys.executable, "-m", "sagellm", *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return Finished(finished.returncode, finished.stdout, finished.stderr)


def cluster_file(folder: Path, name: str = "small", count: int = 1) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(CLUSTER_TEXT.format(name=name, count=count))
    return path
