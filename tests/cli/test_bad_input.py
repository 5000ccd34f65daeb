"""Every error of the user is one sentence, with exit code 2, no traceback, and no file left half written."""

from pathlib import Path

import pytest
from running_sagellm import Finished, cluster_file, sagellm, sagellm_in_a_process


def assert_is_one_sentence(finished: Finished, *words: str) -> None:
    assert finished.code == 2
    assert finished.out == ""
    assert "Traceback" not in finished.err
    assert finished.err.startswith("sagellm: ")
    assert finished.err.count("\n") == 1
    for word in words:
        assert word in finished.err, finished.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "0"], ["--rate", "0", "x>0"]),
        (["--rate", "-3"], ["--rate", "x>0"]),
        (["--rate", "nan"], ["rate", "nan"]),
        (["--rate", "many"], ["--rate", "many"]),
        (["--rate", "2", "--rate-scale", "3"], ["--rate-scale", "one of them"]),
        (["--limit", "0"], ["--limit", "x>=1"]),
        (["--seed", "-1"], ["--seed", "x>=0"]),
        (["--slo", "ttft=5"], ["--slo", "'5'", "500ms"]),
        (["--slo", "latency=5s"], ["--slo", "latency=5s", "ttft=500ms"]),
        (["--cluster", "h200x8"], ["h200x8", "did you mean"]),
        (["--frate", "3"], ["--frate", "--rate"]),
        (["azure-con"], ["azure-con", "did you mean 'azure-conv'"]),
        (["missing.csv"], ["missing.csv", "neither a file nor a generator"]),
        (["."], ["directory"]),
    ],
)
def test_replay(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    outputs = ["--json", "r.json", "--log", "r.jsonl"]
    finished = sagellm("replay", *outputs, "--cluster", cluster_file(tmp_path), *arguments, cwd=tmp_path)
    assert_is_one_sentence(finished, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize("option", ["--json", "--requests", "--report", "--log", "--perfetto"])
def test_an_output_that_cannot_be_written_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def must_not_run(*_arguments: object) -> None:
        pytest.fail("a simulation was begun")

    monkeypatch.setattr("sagellm.commands.replay_run.simulate", must_not_run)
    path = cluster_file(tmp_path)
    finished = sagellm("replay", "--cluster", path, option, tmp_path / "missing" / "file", "--limit", "200")
    assert_is_one_sentence(finished, "missing", "cannot write")


def test_two_outputs_on_one_path(tmp_path: Path) -> None:
    path = cluster_file(tmp_path)
    finished = sagellm("replay", "--cluster", path, "--json", tmp_path / "a", "--requests", tmp_path / "a")
    assert_is_one_sentence(finished, "two outputs")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("a,b\n1,2\n", ["a,b"]),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0,-5,1\n", ["line 2", "num_prefill_tokens", "-5"]),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n0,5,x\n", ["line 2", "num_decode_tokens", "x"]),
        ("num_prefill_tokens,num_decode_tokens\n5,5\n", ["arrived_at"]),
        ('{"timestamp": 0, "input_length": 5, "outp', ["line 1"]),
    ],
)
def test_a_bad_trace(tmp_path: Path, text: str, words: list[str]) -> None:
    trace = tmp_path / "trace"
    trace.write_text(text)
    assert_is_one_sentence(sagellm("replay", trace, "--cluster", cluster_file(tmp_path)), str(trace), *words)
    assert_is_one_sentence(sagellm("traces", "stats", trace), str(trace), *words)


def test_a_bad_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: Qwen/Qwen2.5-7B\ninstances:\n  - {device: h200, role: decode}\n")
    assert_is_one_sentence(sagellm("replay", "--cluster", path), f"{path}:3", "instances[0].role", "prefill")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["traces", "generate", "poison"], ["poison", "poisson"]),
        (["traces", "generate", "poisson", "-n", "0"], ["x>=1"]),
        (["traces", "generate", "poisson", "-o", "missing/file"], ["missing/file"]),
        (["clusters", "show", "h100x1"], ["h100x1", "h200x1"]),
        (["log", "replay", "missing.jsonl"], ["missing.jsonl", "cannot read"]),
        (["log", "diff", "missing.jsonl", "missing.jsonl"], ["missing.jsonl", "cannot read"]),
    ],
)
def test_other_commands(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    assert_is_one_sentence(sagellm(*arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_the_exit_code_reaches_the_shell() -> None:
    assert_is_one_sentence(sagellm_in_a_process("replay", "--rate", "0"), "--rate")


def test_a_file_that_is_no_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("{}\n")
    assert_is_one_sentence(sagellm("log", "replay", path), str(path), "line 1")
