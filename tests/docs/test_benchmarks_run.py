"""Benchmarks work with the code as it is, and their README names each of them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.offline_throughput import NUM_OUTPUT_TOKENS, offline_trace
from benchmarks.poll_latency import CASES
from benchmarks.replay_speed import Case, measure

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_benchmark_has_its_command_in_the_readme() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"`python (benchmarks/\S+\.py)`", text)
    commands += [f"{name.replace('.', '/')}.py" for name in re.findall(r"`python -m (benchmarks\.\S+?)`", text)]
    runnable = [path for path in FOLDER.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    files = [str(path.relative_to(FOLDER.parent)) for path in runnable]
    assert sorted(commands) == sorted(files)


@pytest.mark.parametrize(("name", "measure_polls"), CASES)
def test_each_kind_of_poll_can_be_timed(name: str, measure_polls: Callable[[int], list[int]]) -> None:
    durations_ns = measure_polls(20)
    assert len(durations_ns) == 20, name
    assert min(durations_ns) > 0


def test_the_offline_requests_are_those_that_were_measured() -> None:
    requests = offline_trace().requests
    assert len(requests) == 256
    assert sum(request.num_output_tokens for request in requests) == NUM_OUTPUT_TOKENS


def test_a_whole_replay_is_timed_and_counted(tmp_path: Path) -> None:
    case = Case("a few requests", 2, ("azure-conv", "--limit", "3"), writes_json=True)
    result = measure(case, 1, tmp_path, {})
    assert result.num_requests == 3
    assert result.num_forward_passes > result.num_requests
    assert result.requests_per_s == pytest.approx(3 / result.median_wall_s)
    assert result.peak_rss_mib > 20  # no bound above: a child counts what its parent had when it was forked
    assert result.median_cpu_s > 0
