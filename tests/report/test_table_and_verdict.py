"""What the terminal shows."""

from handmade_runs import record, rejected, run_of

from sagellm.core.request import LatencySLO
from sim.report.table import render_table, table_rows
from sim.report.verdict import verdict


def many(number: int, **kwargs: int) -> list:
    return [record(str(i), **kwargs) for i in range(number)]


def test_every_metric_of_the_issue_has_a_row() -> None:
    labels = {row.metric for row in table_rows([run_of("a", record("1"))])}
    wanted = {"TTFT (ms)", "TPOT (ms)", "ITL (ms)", "E2E latency (ms)", "throughput", "goodput", "SLO attainment"}
    wanted |= {"KV use", "preemptions", "prefix hits", "KV transfer (ms)", "cost profile", "requests", "wall time"}
    assert wanted <= labels


def test_columns_line_up() -> None:
    table = render_table([run_of("a", *many(3)), run_of("a-much-longer-name", *many(3, ttft_ms=99_999))])
    heading, rule, *lines = table.splitlines()
    assert heading.endswith("a-much-longer-name")
    assert {len(line) for line in (heading, *lines)} == {len(rule)}


def test_a_run_that_completed_nothing_prints_dashes() -> None:
    rows = table_rows([run_of("a", rejected("1"))])
    assert [row.cells for row in rows if row.detail == "p99"] == [("-",)] * 5
    assert verdict([run_of("a", rejected("1"))]) == "No request completed."


def test_the_cluster_with_more_goodput_wins_for_the_reason_that_it_does() -> None:
    late_first_token = run_of("late", *many(60), *(record(f"x{i}", ttft_ms=900) for i in range(40)))
    in_time = run_of("in-time", *many(100))
    for runs in ([late_first_token, in_time], [in_time, late_first_token]):
        sentence = verdict(runs)
        assert sentence.startswith("in-time is better than late")
        assert "100.0% against 60.0%" in sentence
        assert "because more keep the TTFT limit" in sentence
        assert "p99 100.0 ms against 900.0 ms" in sentence
        assert "TPOT" not in sentence


def test_the_price_of_winning_is_named() -> None:
    winner = run_of("winner", *many(80), *(record(f"x{i}", tpot_ms=60) for i in range(20)))
    loser = run_of("loser", *many(50), *(record(f"x{i}", ttft_ms=900) for i in range(50)))
    assert "although fewer keep the TPOT limit" in verdict([winner, loser])


def test_a_difference_within_noise_is_none() -> None:
    runs = [run_of("a", *many(1000)), run_of("b", *many(995), *(record(f"x{i}", ttft_ms=900) for i in range(5)))]
    assert verdict(runs).startswith("No difference in goodput between a and b")


def test_without_limits_latency_decides() -> None:
    slow, quick = (
        run_of(name, *many(10, ttft_ms=ttft_ms, slo=LatencySLO()), slo=LatencySLO())
        for name, ttft_ms in (("slow", 900), ("quick", 100))
    )
    assert verdict([slow, quick]).startswith("quick is better than slow: its mean latency is")


def test_one_cluster_is_described() -> None:
    assert verdict([run_of("a", *many(10))]).startswith("a keeps the SLO (TTFT 500 ms, TPOT 50 ms) for 100.0% of")


def test_nobody_keeps_the_limits() -> None:
    runs = [run_of(name, *many(5, ttft_ms=900)) for name in ("a", "b")]
    assert verdict(runs).startswith("No request keeps the SLO")


def test_a_cluster_on_which_nothing_completed_loses() -> None:
    assert verdict([run_of("a", rejected("0")), run_of("b", *many(5))]).startswith("b is the only cluster")
