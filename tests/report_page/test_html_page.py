"""The page as a whole: self-contained, well formed, and true to the metrics."""

import math
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_report_runs import SLO, synthetic_run

from sagellm.core.request import FinishReason, LatencySLO
from sagellm.core.run_metrics import RequestRecord, RunMetrics
from sim.report.axis import format_duration
from sim.report.html_report import html_report, unbroken, write_html_report
from sim.report.output_file import OutputError
from sim.report.report_run import ReportRun, run_labels

VOID = {"meta"}
NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?")
COORDINATES = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "d", "dx", "dy", "height", "width")


@dataclass
class Plot:
    label: str
    low: float
    high: float
    paths: dict[str, str] = field(default_factory=dict)


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the plots and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.plots: list[Plot] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.stack.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs)
        self.attributes += [(tag, name, value) for name, value in values.items()]
        if values.get("class") == "plot":
            low, high = values["data-x"].split(",")[:2]
            self.plots.append(Plot(values["aria-label"], float(low), float(high)))
        if tag == "path" and values["class"].startswith("line"):
            self.plots[-1].paths[values["data-name"]] = values["d"]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def plot(self, start: str) -> Plot:
        return next(plot for plot in self.plots if plot.label.startswith(start))


def empty_run() -> ReportRun:
    return ReportRun("c", "t", 0, "spec", RunMetrics())


def none_completed() -> ReportRun:
    run = synthetic_run(20)
    rejected = {
        name: RequestRecord(record.request, reject_reason="full") for name, record in run.metrics.requests.items()
    }
    return replace(run, metrics=RunMetrics(requests=rejected))


def one_request(num_output_tokens: int) -> ReportRun:
    run = synthetic_run(1, num_decode=1)
    (record,) = run.metrics.requests.values()
    record.num_output_tokens = num_output_tokens
    return run


CASES = {
    "no runs": list,
    "a run of nothing": lambda: [empty_run()],
    "none completed": lambda: [none_completed()],
    "one request": lambda: [one_request(5)],
    "one request of one token": lambda: [one_request(1)],
    "one run without transfers": lambda: [synthetic_run(200)],
    "no limits": lambda: [synthetic_run(50, slo=LatencySLO())],
    "five runs": lambda: [synthetic_run(60, i % 2, 1 + i, seed=i, trace=f"trace-{i}") for i in range(5)],
    "eight runs": lambda: [synthetic_run(10, seed=i) for i in range(8)],
    "many instances": lambda: [synthetic_run(100, num_decode=40)],
    "a good and an empty run": lambda: [synthetic_run(100, 1, 2), empty_run()],
}


@pytest.mark.parametrize("case", CASES)
def test_page_is_well_formed_and_every_coordinate_is_finite(case: str) -> None:
    page = Page(html_report(CASES[case](), "A verdict."))
    assert "A verdict." in page.text
    for tag, name, value in page.attributes:
        if name not in COORDINATES or tag == "meta":
            continue
        bare = NUMBER.sub("", value)
        assert set(bare) <= set("MLZ% em,"), (tag, name, value)
        assert all(math.isfinite(float(number)) for number in NUMBER.findall(value))
    for plot in page.plots:
        assert math.isfinite(plot.low)
        assert plot.low < plot.high < math.inf
    assert "nan" not in page.text.split()


def test_page_needs_no_network() -> None:
    text = html_report([synthetic_run(100, 1, 1)], "v")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(|\bimport\b", text)
    page = Page(text)
    assert not [entry for entry in page.attributes if entry[1] in ("src", "href", "srcset", "action")]
    assert not {"link", "img", "iframe", "base", "object"} & set(page.tags)


def test_names_are_escaped_wherever_they_stand() -> None:
    bad = "<script>alert('x')</script>&\"$title"
    run = replace(
        synthetic_run(30), cluster=bad, trace=bad, profile_status=bad, notes=(bad,), summary_rows=((bad, bad),)
    )
    renamed = tuple(replace(instance, role=bad) for instance in run.instances)
    text = html_report([replace(run, instances=renamed)], bad)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert bad in page.text
    assert bad in page.plot("TTFT").paths


def test_figures_in_the_page_are_those_of_the_metrics() -> None:
    run = synthetic_run(1500, 1, 2, rate_per_s=25.0)
    page = Page(html_report([run]))
    records = [r for r in run.metrics.requests.values() if r.finish_reason is FinishReason.LENGTH]
    for start, values in {
        "TTFT": [r.ttft_ns / 1e9 for r in records],
        "TPOT": [r.tpot_ns / 1e9 for r in records if r.tpot_ns is not None],
        "E2E": [r.e2el_ns / 1e9 for r in records],
    }.items():
        for share in (0.5, 0.9, 0.99):
            expected = float(np.quantile(values, share))
            assert format_duration(expected, trim=False) in page.text, (start, share)
            drawn_below, drawn_above = drawn_at(page.plot(start), run.cluster, share)
            assert drawn_below * 0.98 <= expected <= drawn_above * 1.02


def test_tail_of_the_gaps_is_that_of_the_metrics() -> None:
    run = synthetic_run(1500, 1, 2, rate_per_s=25.0)
    page = Page(html_report([run]))
    gaps_s = np.repeat(run.metrics.itl_ns, run.metrics.itl_count) / 1e9
    for value_s in (*np.quantile(gaps_s, (0.5, 0.9, 0.99)), gaps_s.max()):
        assert format_duration(float(value_s), trim=False) in page.text
    plot = page.plot("ITL")
    low = float(np.mean(gaps_s == gaps_s.max()))
    corners = [tuple(map(int, pair.split())) for pair in plot.paths[run.cluster][1:].split("L")]
    for x, y in corners[1:-1]:
        at_s, drawn = plot.low * (plot.high / plot.low) ** (x / 10_000), low ** (y / 10_000)
        # The drawing rounds to a ten-thousandth of its width.
        assert np.mean(gaps_s > at_s * 1.001) * 0.9 <= drawn <= np.mean(gaps_s >= at_s * 0.999) * 1.1


def drawn_at(plot: Plot, name: str, share: float) -> tuple[float, float]:
    """The values between which the line crosses ``share``, read off the drawing."""
    corners = [tuple(map(int, pair.split())) for pair in plot.paths[name][1:].split("L")]
    values = [plot.low * (plot.high / plot.low) ** (x / 10_000) for x, _ in corners]
    shares = [1 - y / 10_000 for _, y in corners]
    crossing = next(i for i, reached in enumerate(shares) if reached >= share)
    return values[max(0, crossing - 1)], values[crossing]


def test_attainment_counts_what_failed_and_what_meets_both_limits() -> None:
    run = synthetic_run(1500, 1, 2, rate_per_s=45.0)
    records = list(run.metrics.requests.values())
    good = sum(record.meets_slo() for record in records)
    assert 0 < good < len([r for r in records if r.e2el_ns is not None])
    page = Page(html_report([run]))
    assert SLO.ttft_ns is not None
    assert SLO.tpot_ns is not None
    for start, limit_ns in (("Goodput as the TTFT", SLO.ttft_ns), ("Goodput as the TPOT", SLO.tpot_ns)):
        plot = page.plot(start)
        at = 10_000 * math.log(limit_ns / 1e9 / plot.low) / math.log(plot.high / plot.low)
        corners = [tuple(map(int, pair.split())) for pair in plot.paths[run.cluster][1:].split("L")]
        drawn = 1 - np.interp(at, [x for x, _ in corners], [y for _, y in corners]) / 10_000
        assert drawn == pytest.approx(good / len(records), abs=0.01)
    last_ns = max(r.last_token_ns for r in records if r.last_token_ns is not None)
    seconds = (last_ns - records[0].request.arrival_ns) / 1e9
    assert f"{good / seconds:.2f}\u00a0req/s" in page.text
    assert f"{100 * good / len(records):.1f}\u00a0%" in page.text


def test_charts_that_would_say_nothing_are_left_out() -> None:
    limited, unlimited = (Page(html_report([synthetic_run(50, slo=slo)])) for slo in (SLO, LatencySLO()))
    assert any(plot.label.startswith("Goodput") for plot in limited.plots)
    assert not any(plot.label.startswith("Goodput") for plot in unlimited.plots)
    run = synthetic_run(50, num_decode=1, rate_per_s=0.1)
    for name, column in (
        ("Queued", run.metrics.queue_depth),
        ("Waiting", next(iter(run.metrics.timelines.values())).num_waiting),
    ):
        for i in range(len(column)):
            column[i] = 0
        page = Page(html_report([run]))
        assert not any(plot.label.startswith(name) for plot in page.plots)
        column[0] = 1
        assert any(plot.label.startswith(name) for plot in Page(html_report([run])).plots)
        column[0] = 0
    assert "No request ever waited" in Page(html_report([run])).text


def test_transfers_have_their_charts_only_where_there_are_any() -> None:
    assert "KV transfers" not in html_report([synthetic_run(50)])
    page = Page(html_report([synthetic_run(50, 1, 1), synthetic_run(50)]))
    assert "KV transfers" in page.text
    assert "circle" in page.tags


def test_write_replaces_whole_or_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    write_html_report(target, [synthetic_run(20)], "v")
    assert target.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(OutputError, match="cannot write here"):
        write_html_report(tmp_path / "missing" / "report.html", [synthetic_run(20)])
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_same_runs_give_the_same_page() -> None:
    assert html_report([synthetic_run(50, 1, 1)]) == html_report([synthetic_run(50, 1, 1)])


def test_size_stays_small_for_many_requests_and_instances() -> None:
    runs = [synthetic_run(3000, num_decode=4, cluster=name) for name in ("a", "b")]
    size = len(html_report(runs).encode())
    assert size < 600_000
    # What is drawn is downsampled: ten times the requests would add next to nothing.
    assert size < 1.5 * len(html_report([synthetic_run(600, cluster=name) for name in ("a", "b")]).encode())


def test_labels_tell_equal_clusters_apart() -> None:
    run = empty_run()
    assert run_labels([run, replace(run, cluster="d")]) == ["c", "d"]
    assert run_labels([run, replace(run, trace="u")]) == ["c, t", "c, u"]
    assert run_labels([run, replace(run, seed=1)]) == ["c, seed 0", "c, seed 1"]
    assert run_labels([run, run]) == ["c, run 1", "c, run 2"]


def test_a_number_keeps_its_unit_on_the_line() -> None:
    assert unbroken("97.1 % within 50 ms on 4 servers") == "97.1\u00a0% within 50\u00a0ms on 4 servers"
