"""The JSON and CSV files hold exactly what their schema says."""

import csv
import io
import json

import pytest
from handmade_runs import record, rejected, run_of

from sagellm.core.request import FinishReason
from sim.report.csv_report import write_request_rows
from sim.report.json_report import write_json_report

RUN_KEYS = """
    cluster trace seed num_requests completed rejected failed duration_s request_throughput output_throughput
    total_token_throughput request_goodput slo_attainment profile_status log_sha256 wall_s num_steps
    num_preemptions prefix_hit_ratio
"""
LATENCY_KEYS = [f"{s}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for s in ("mean", "median", "p90", "p99")]
ROW_KEYS = """
    request_id arrival_s num_prompt_tokens num_output_tokens num_cached_tokens ttft_ms tpot_ms e2el_ms
    prefill_instance decode_instance finish_reason
"""


def json_of(*runs: object) -> dict:
    file = io.StringIO()
    write_json_report(file, runs)
    return json.loads(file.getvalue())


def rows_of(*runs: object) -> list[dict[str, str]]:
    file = io.StringIO()
    write_request_rows(file, runs)
    return list(csv.DictReader(io.StringIO(file.getvalue())))


def test_json_has_the_keys_of_schema_1() -> None:
    report = json_of(run_of("a", record("1")), run_of("b", record("1")))
    assert report["schema"] == 1
    assert [run["cluster"] for run in report["runs"]] == ["a", "b"]
    assert list(report["runs"][0]) == RUN_KEYS.split() + LATENCY_KEYS


def test_json_latencies_are_milliseconds() -> None:
    (run,) = json_of(run_of("a", record("1", ttft_ms=100, tpot_ms=10, num_output_tokens=11)))["runs"]
    assert (run["mean_ttft_ms"], run["p99_tpot_ms"], run["median_e2el_ms"]) == pytest.approx((100, 10, 200))


def test_json_of_a_run_that_completed_nothing_has_nulls() -> None:
    (run,) = json_of(run_of("a", rejected("1")))["runs"]
    assert run["completed"] == 0
    assert run["slo_attainment"] == 0
    assert all(run[key] is None for key in LATENCY_KEYS)


def test_csv_has_a_row_per_request() -> None:
    first, second, third = rows_of(run_of("a", record("1"), rejected("2"), record("3", reason=FinishReason.ERROR)))
    assert list(first) == ROW_KEYS.split()
    assert (first["ttft_ms"], first["e2el_ms"], first["finish_reason"]) == ("100.000000", "200.000000", "length")
    assert (second["ttft_ms"], second["finish_reason"]) == ("", "rejected")
    assert (third["e2el_ms"], third["finish_reason"]) == ("", "error")


def test_csv_of_several_runs_says_which_is_which() -> None:
    rows = rows_of(run_of("a", record("1")), run_of("b", record("1")))
    assert [row["cluster"] for row in rows] == ["a", "b"]
    assert list(rows[0]) == [*ROW_KEYS.split(), "cluster"]
