"""What online runs came to is compared as it should be. (The whole needs a server: see the script's own smoke run.)"""

from pathlib import Path

import pytest

from benchmarks.h200.serve_online import CASES, FIGURES, OnlineReport, OnlineRun, main, print_case, run_of

CONVERSATION = CASES[0]


@pytest.mark.parametrize(
    ("key", "kept", "missed"),
    [("median_ttft_ms", 36.64, 36.66), ("p99_tpot_ms", 12.82, 12.826), ("output_throughput", 3947.6, 3947.4)],
)
def test_a_limit_is_kept_to_its_decimals(key: str, kept: float, missed: float) -> None:
    figure = next(figure for figure in FIGURES if figure.key == key)
    limit = CONVERSATION.reference[key]
    assert figure.keeps(kept, limit)
    assert not figure.keeps(missed, limit)


def report_of(medians_ms: list[float], limit: int | None = None) -> OnlineReport:
    runs = [
        OnlineRun(CONVERSATION.name, run, {"median_ttft_ms": median_ms}, 600, 600)
        for run, median_ms in enumerate(medians_ms, 1)
    ]
    return OnlineReport("h200x1", limit, 1.0, [*runs, OnlineRun("code-6", 1, {"median_ttft_ms": 7.0})])


def test_the_table_has_every_run_their_median_and_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    print_case(CONVERSATION, report_of([30.0, 50.0, 36.0]))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("TTFT p50"))
    assert line.split()[3:] == ["30.0", "50.0", "36.0", "36.0", "36.6", "met"]
    print_case(CONVERSATION, report_of([40.0, 50.0]))
    assert "missed" in capsys.readouterr().out


def test_a_part_of_a_load_is_compared_with_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_case(CONVERSATION, report_of([30.0], limit=20))
    printed = capsys.readouterr().out
    assert "36.6" not in printed
    assert "met" not in printed


def test_a_run_is_read_from_the_json_of_a_replay() -> None:
    figures = {figure.key: float(index) for index, figure in enumerate(FIGURES)}
    result = {**figures, "num_requests": 3, "completed": 2, "served": {"p99_client_lag_ms": 1.5}}
    found = run_of("code-6", 2, {"runs": [result | {"p99_tpot_ms": None}]})
    assert found.figures == {key: value for key, value in figures.items() if key != "p99_tpot_ms"}
    assert (found.num_requests, found.num_completed, found.client_lag_p99_ms) == (3, 2, 1.5)
    assert not found.is_whole


def test_a_trace_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "code.csv"
    assert main([str(tmp_path / "out.json"), "--only", "code-6", "--code", str(missing)]) == 2
    assert str(missing) in capsys.readouterr().err
