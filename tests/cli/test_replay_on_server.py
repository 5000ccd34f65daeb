"""``sagellm replay --on``: the same table and files from a server as from a simulation, and both side by side."""

import csv
import json
from pathlib import Path

import pytest
from load_client.scripted_server import refusing, scripted_server, streaming
from running_sagellm import Finished, cluster_file, sagellm, sagellm_in_a_process

TRACE = ["poisson", "--limit", "12", "--rate", "200"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that a simulation beside a server writes, and what it printed."""
    folder = tmp_path_factory.mktemp("both")
    outputs = ["--json", "r.json", "--requests", "r.csv", "--report", "r.html", "--log", "r.jsonl", "--perfetto", "p"]
    with scripted_server(streaming()) as (url, _):
        on = ["--on", url, "--on", "sim", "--cluster", cluster_file(folder), "--slo", "ttft=20s,tpot=5s"]
        finished = sagellm("replay", *TRACE, *on, *outputs, cwd=folder)
    assert (finished.code, finished.err) == (0, "")
    (folder / "printed").write_text(finished.out.replace(url, "http://server"))
    return folder


def row(printed: str, metric: str, detail: str) -> list[str]:
    """The cells of one line of the table; a metric's name stands on the first of its lines only."""
    lines = printed.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(metric))
    line = next(line for line in lines[first:] if line.removeprefix(metric).strip().startswith(detail))
    return line.removeprefix(metric).strip().removeprefix(detail).replace(" %", "%").split()


def test_the_table_shows_both_and_the_difference(both: Path) -> None:
    printed = (both / "printed").read_text()
    heading = next(line for line in printed.splitlines() if line.endswith("difference"))
    assert heading.split() == ["small", "http://server", "difference"]
    simulated, served, difference = (
        float(cell.strip("%").replace(",", "")) for cell in row(printed, "TPOT (ms)", "mean")
    )
    assert difference == pytest.approx(100 * (simulated / served - 1), rel=0.1)
    for detail in ("requests/s", "output tokens/s"):
        assert row(printed, "throughput", detail)[2].endswith("%")
    assert "of what http://server did in mean, p50 and p90 of TTFT, TPOT and E2E" in printed


def test_what_a_client_cannot_know_is_not_zero(both: Path) -> None:
    printed = (both / "printed").read_text()
    for metric, detail in (("KV use", "mean"), ("preemptions", ""), ("steps", ""), ("cost profile", "status")):
        simulated, served = row(printed, metric, detail)
        assert served == "-" != simulated
    server = json.loads((both / "r.json").read_text())["runs"][1]
    assert [server[key] for key in ("num_steps", "num_preemptions", "profile_status", "log_sha256")] == [None] * 4
    page = (both / "r.html").read_text()
    assert "it knows nothing of steps and KV" in page
    assert "0 forward passes" not in page


def test_the_files_hold_both_runs_alike(both: Path) -> None:
    report = json.loads((both / "r.json").read_text())
    simulated, served = report["runs"]
    assert set(served) - set(simulated) == {"served"}
    assert served["served"]["model"] == "scripted"
    assert served["served"]["failures"] == {}
    assert served["completed"] == simulated["completed"] == 12
    assert served["slo_attainment"] == 1.0
    assert served["prefix_hit_ratio"] > 0
    (difference,) = report["differences"]
    assert (difference["cluster"], difference["reference"]) == ("small", served["cluster"])
    for figure in ("mean_ttft_ms", "p99_itl_ms", "median_e2el_ms", "output_throughput"):
        assert difference["relative"][figure] == pytest.approx(simulated[figure] / served[figure] - 1)
    rows = list(csv.DictReader((both / "r.csv").read_text().splitlines()))
    assert [each["cluster"] for each in rows] == ["small"] * 12 + [served["cluster"]] * 12
    keys = ("request_id", "num_prompt_tokens", "num_output_tokens", "finish_reason")
    ours, theirs = ({tuple(each[key] for key in keys) for each in part} for part in (rows[:12], rows[12:]))
    assert ours == theirs
    assert (both / "r.jsonl").stat().st_size > 0


def on_server(answer: object, *options: str | Path, cwd: Path | None = None) -> Finished:
    with scripted_server(answer) as (url, _):
        return sagellm("replay", *TRACE, "--on", url, *options, cwd=cwd)


def test_a_server_alone_is_reported_like_a_cluster(tmp_path: Path) -> None:
    finished = on_server(streaming(), "--json", "r.json", "--report", "r.html", cwd=tmp_path)
    assert (finished.code, finished.err) == (0, "")
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert run["completed"] == 12
    assert "difference" not in finished.out
    assert f"On {run['cluster']} p99 TTFT is" in finished.out
    assert "Load and KV use" not in (tmp_path / "r.html").read_text()


def test_why_requests_came_to_nothing_is_said(tmp_path: Path) -> None:
    finished = on_server(refusing(429, {"error": {"message": "full"}}), "--json", "r.json", cwd=tmp_path)
    assert finished.code == 0
    assert "12 requests came to nothing: 429: full" in finished.out
    (run,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert (run["rejected"], run["failed"], run["completed"]) == (12, 0, 0)


WRONG = {
    "no address": (["--on", "nowhere"], "--on: 'nowhere' is not the address of a server; write http://HOST:PORT, or"),
    "nobody listens": (["--on", "http://127.0.0.1:9"], "http://127.0.0.1:9: nobody listens there"),
    "clusters for nobody": (["--on", "http://127.0.0.1:9", "--cluster", "h200x1"], "--cluster names what is simulated"),
    "a log from a server": (["--on", "http://127.0.0.1:9", "--log", "x"], "--log writes what the machines decided"),
    "time-out": (["--on", "http://127.0.0.1:9", "--request-timeout", "5"], "'5' is not a duration"),
}


@pytest.mark.parametrize(("options", "complaint"), WRONG.values(), ids=WRONG)
def test_bad_input_is_one_sentence(options: list[str], complaint: str, tmp_path: Path) -> None:
    finished = sagellm("replay", *TRACE, *options, "--json", "r.json", cwd=tmp_path)
    assert finished.code == 2
    assert finished.out == ""
    assert complaint in finished.err
    assert len(finished.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_served() -> None:
    finished = on_server(streaming(), "--on-model", "mine")
    assert finished.code == 2
    assert "does not serve 'mine'; it serves scripted, other" in finished.err


def test_it_runs_as_a_user_runs_it() -> None:
    with scripted_server(streaming(), api_key="k") as (url, _):
        finished = sagellm_in_a_process("replay", *TRACE, "--on", url, "--api-key", "k")
        refused = sagellm("replay", *TRACE, "--on", url)
    assert (finished.code, finished.err) == (0, "")
    assert (refused.code, refused.out) == (2, "")
    assert "refuses the API key" in refused.err
