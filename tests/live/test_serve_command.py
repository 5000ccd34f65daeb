"""``sagellm serve`` as a user runs it: one sentence for each mistake, and a good end for each process."""

import ast
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from sagellm.cli import main
from sagellm.log_replay import replay_log


def serve_here(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Run it in this process, for what ends before anything is started."""
    with (
        chdir(cwd),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as left,
    ):
        main(["serve", "--port", "0", *arguments])
    assert out.getvalue() == ""
    return int(left.value.code or 0), err.getvalue()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "cpu-toi"], ["cpu-toi", "did you mean 'cpu-toy'"]),
        (["--cluster", "h200x1"], ["cuda"]),
        (["--backend", "cuda"], ["cuda"]),
        (["--backend", "gpu"], ["'gpu'", "there are", "cpu"]),
        (["--model", "Qwen/Qwen2.5-72B", "--load-format", "dummy", "--backend", "none"], ["needs", "GiB"]),
        (["--model", "empty", "--backend", "none"], ["empty/config.json", "cannot be read"]),
        (["--cluster", "tensor_parallel.yaml"], ["mixed-0", "tp is 2", "tp: 1"]),
        (["--cluster", "bad.yaml"], ["bad.yaml:3", "instance"]),
        (["--log", "missing/run.jsonl", "--backend", "none"], ["--log", "missing/run.jsonl", "cannot write"]),
        (["--tokenizer", "missing", "--backend", "none"], ["--tokenizer", "missing", "tokenizer.json"]),
        (["--tokenizer", "empty", "--backend", "none"], ["empty/tokenizer.json"]),
        (["--chat-template", "missing", "--backend", "none"], ["--chat-template", "missing"]),
        (["--api-key", ""], ["--api-key", "empty"]),
        (["--host", "no.such.host.invalid", "--backend", "none"], ["no.such.host.invalid", "--host"]),
        (["--port", "70000"], ["--port", "70000"]),
    ],
)
def test_every_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    cpu = "model: sagellm/toy\ninstances:\n  - {device: cpu, tp: 2, kv_tokens: 4096}\n"
    (tmp_path / "tensor_parallel.yaml").write_text(cpu)
    (tmp_path / "bad.yaml").write_text(cpu.replace("tp: 2", "instance: 2"))
    code, error = serve_here(*arguments, cwd=tmp_path)
    assert code == 2
    assert error.startswith("sagellm: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error, error


def test_a_port_in_use_is_found_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, error = serve_here("--backend", "none", "--host", "127.0.0.1", "--port", port, cwd=tmp_path)
    assert code == 2
    assert error == (
        f"sagellm: cannot listen at 127.0.0.1, port {port}: Address already in use; "
        "choose another with --host, --port\n"
    )


@pytest.mark.parametrize("missing", ["zmq", "torch", "tokenizers"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else object())
    code, error = serve_here(cwd=tmp_path)
    assert (code, error) == (
        2,
        f"sagellm: serving needs {missing}, which is not installed; run: pip install 'sagellm[serve]'\n",
    )


def test_nothing_of_the_extra_is_imported_before_it_is_looked_for() -> None:
    code = (
        "import sys; before = set(sys.modules); import sagellm.commands.serve, sagellm.commands.serve_requirements; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"zmq", "jinja2", "tokenizers", "prometheus_client", "torch"} & set(ast.literal_eval(imported))


@contextmanager
def serving(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A server with made-up tokens, and its port."""
    command = [sys.executable, "-m", "sagellm", "serve", "--backend", "none", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if found := re.search(r"Serving .* at http://localhost:(\d+)", line):
                    yield server, int(found[1])
                    break
            else:
                assert server.stderr is not None
                pytest.fail(f"it did not start: {server.stderr.read()}")
        finally:
            server.kill()


@contextmanager
def completion(port: int, max_tokens: int) -> Iterator[http.client.HTTPResponse]:
    """An answer that is being streamed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = {"prompt": [1, 2, 3], "max_tokens": max_tokens, "stream": True}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as response:
            yield response


def children_of(process_id: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def wait_until_gone(process_ids: list[int]) -> None:
    deadline_s = time.monotonic() + 10
    while any(is_running(each) for each in process_ids):
        assert time.monotonic() < deadline_s, f"{process_ids} are still there"
        time.sleep(0.02)


def is_running(process_id: int) -> bool:
    """Whether it is there, and not merely waiting for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="children are looked up in /proc")
def test_sigterm_lets_streams_end_and_leaves_nobody(tmp_path: Path) -> None:
    """F35, with a client in the middle of an answer; the log is whole and replays."""
    log = tmp_path / "run.jsonl"
    with serving("--log", str(log)) as (server, port):
        instances = children_of(server.pid)
        assert instances
        with completion(port, 2000) as response:
            first = response.readline()
            server.send_signal(signal.SIGTERM)
            rest = response.read()
        assert server.wait(20) == 0
    text = "".join(re.findall(r'"text":"([a-z]*)"', (first + rest).decode()))
    assert len(text) == 2000
    assert rest.endswith(b"data: [DONE]\n\n")
    wait_until_gone(instances)
    with log.open("rb") as lines:
        result = replay_log(lines, "log")
    assert result.difference is None
    assert result.num_polls > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="children are looked up in /proc")
def test_sigterm_while_it_starts_leaves_nobody() -> None:
    command = [sys.executable, "-m", "sagellm", "serve", "--backend", "none", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            assert server.stderr.readline().startswith("Starting 1 x")
            instances = children_of(server.pid)
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
            assert "Traceback" not in server.stderr.read()
        finally:
            server.kill()
    wait_until_gone(instances)


@pytest.mark.skipif(sys.platform != "linux", reason="children are looked up in /proc")
def test_instances_end_with_a_front_that_is_killed() -> None:
    with serving() as (server, _):
        instances = children_of(server.pid)
        assert instances
        os.kill(server.pid, signal.SIGKILL)
        server.wait(10)
        wait_until_gone(instances)


def test_one_process_serves_as_well() -> None:
    with serving("--single-process") as (server, port):
        with completion(port, 30) as response:
            assert response.status == 200
            assert response.read().endswith(b"data: [DONE]\n\n")
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
