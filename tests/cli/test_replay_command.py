"""``sagellm replay`` from end to end, on small runs."""

import csv
import json
from pathlib import Path

import pytest
from running_sagellm import cluster_file, sagellm


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a run over two clusters writes, and what it printed."""
    folder = tmp_path_factory.mktemp("two-runs")
    one, two = cluster_file(folder, "one", 1), cluster_file(folder, "two", 2)
    outputs = [
        "--json",
        "r.json",
        "--requests",
        "r.csv",
        "--report",
        "r.html",
        "--log",
        "r.jsonl",
        "--perfetto",
        "p.json",
    ]
    finished = sagellm(
        "replay", "--limit", "60", "--cluster", one, "--cluster", two, *outputs, "--log", "r.jsonl", cwd=folder
    )
    assert (finished.code, finished.err) == (0, "")
    (folder / "printed").write_text(finished.out)
    return folder


def test_the_terminal_shows_table_verdict_and_time(two_runs: Path) -> None:
    printed = (two_runs / "printed").read_text()
    heading = next(line for line in printed.splitlines() if line.endswith(" two"))
    assert "one" in heading.split()
    for word in ("TTFT (ms)", "TPOT (ms)", "ITL (ms)", "E2E latency (ms)", "goodput", "KV use", "cost profile"):
        assert word in printed
    assert printed.splitlines()[-1].startswith("Took ")
    assert printed.splitlines()[-2].endswith(".")


def test_json_and_csv_agree(two_runs: Path) -> None:
    runs = json.loads((two_runs / "r.json").read_text())["runs"]
    rows = list(csv.DictReader((two_runs / "r.csv").read_text().splitlines()))
    assert [run["cluster"] for run in runs] == ["one", "two"]
    for run in runs:
        mine = [row for row in rows if row["cluster"] == run["cluster"]]
        assert len(mine) == run["num_requests"] == run["completed"] == 60
        ttfts = [float(row["ttft_ms"]) for row in mine]
        assert run["mean_ttft_ms"] == pytest.approx(sum(ttfts) / 60, abs=1e-5)
        tokens = sum(int(row["num_output_tokens"]) for row in mine)
        assert run["output_throughput"] == pytest.approx(tokens / run["duration_s"])
        assert len(run["log_sha256"]) == 64


def test_nothing_but_what_was_asked_for_is_written(two_runs: Path) -> None:
    names = {path.name for path in two_runs.iterdir()}
    assert names == {
        *("one.yaml", "two.yaml", "printed", "r.json", "r.csv", "r.html", "r.one.jsonl", "r.two.jsonl", "p.json")
    }
    assert "<html" in (two_runs / "r.html").read_text()
    assert json.loads((two_runs / "p.json").read_text())


def test_the_log_replays_and_differs_from_another_runs(two_runs: Path) -> None:
    replayed = sagellm("log", "replay", two_runs / "r.one.jsonl")
    assert (replayed.code, replayed.err) == (0, "")
    assert replayed.out.startswith("No difference")
    assert sagellm("log", "diff", two_runs / "r.one.jsonl", two_runs / "r.one.jsonl").code == 0
    differs = sagellm("log", "diff", two_runs / "r.one.jsonl", two_runs / "r.two.jsonl")
    assert (differs.code, differs.err) == (1, "")
    assert differs.out.startswith("Line 1:")


def test_a_changed_effect_is_found(two_runs: Path) -> None:
    lines = (two_runs / "r.one.jsonl").read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if '"RunStep"' in line)
    lines[number] = lines[number].replace('"step_id":', '"step_id":9', 1)
    changed = two_runs / "changed.jsonl"
    changed.write_text("\n".join(lines) + "\n")
    finished = sagellm("log", "replay", changed)
    changed.unlink()
    assert finished.code == 1
    assert f"line {number + 1}" in finished.out


def test_equal_clusters_get_names_of_their_own(tmp_path: Path) -> None:
    path = cluster_file(tmp_path)
    finished = sagellm("replay", "--limit", "5", "--cluster", path, "--cluster", path, "--json", tmp_path / "r.json")
    assert finished.code == 0
    first, second = json.loads((tmp_path / "r.json").read_text())["runs"]
    assert (first["cluster"], second["cluster"]) == ("small", "small-2")
    assert first["mean_e2el_ms"] == second["mean_e2el_ms"]


def test_rate_slo_and_fast_forward_are_heeded(tmp_path: Path) -> None:
    path = cluster_file(tmp_path)
    common = ["replay", "poisson", "--limit", "40", "--cluster", path, "--seed", "3"]

    def run(*options: str) -> dict:
        assert sagellm(*common, *options, "--json", tmp_path / "r.json").code == 0
        return json.loads((tmp_path / "r.json").read_text())["runs"][0]

    usual = run()
    assert run("--rate", "500")["duration_s"] < usual["duration_s"]
    assert run("--rate-scale", "0.5")["duration_s"] > usual["duration_s"]
    assert run("--slo", "ttft=1ns")["slo_attainment"] == 0.0
    walked = run("--no-fast-forward")
    assert {key: walked[key] for key in walked if key.endswith("_ms")} == {
        key: usual[key] for key in usual if key.endswith("_ms")
    }
