"""``sagellm serve`` with a prefill and a decode process of the toy: losses, and what clients, probes and pages see."""

import contextlib
import http.client
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served_model import ServedModel, served_model

from sagellm.log_replay import replay_log

PROMPTS = [[(31 * index + 5 * position) % 256 for position in range(5 + 40 * index)] for index in range(4)]
CLUSTER = """\
model: sagellm/toy
instances:
  - {device: cpu, role: prefill, name: p, kv_tokens: 8192, max_num_batched_tokens: 64, max_num_seqs: 1}
  - {device: cpu, role: decode, name: d, kv_tokens: 8192, max_num_seqs: 8, prefix_caching: false}
"""


def answer(served: ServedModel, prompt: list[int]) -> list[float]:
    """Log-probabilities of a greedy answer's tokens, which no two answers share."""
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    request = urllib.request.Request(
        f"{served.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        choice = json.load(response)["choices"][0]
    assert choice["finish_reason"] == "length"
    return [round(each, 3) for each in choice["logprobs"]["token_logprobs"]]


def answers(served: ServedModel) -> list[list[float]]:
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(lambda prompt: answer(served, prompt), PROMPTS))


def status(served: ServedModel, path: str, body: bytes | None = None) -> tuple[int, str]:
    request = urllib.request.Request(served.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def kill_and_wait(served: ServedModel, process_id: int, instance_id: str) -> None:
    os.kill(process_id, signal.SIGKILL)
    deadline_s = time.monotonic() + 20
    while not {each["instance_id"]: each["is_lost"] for each in served.live()["instances"]}[instance_id]:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="children are looked up in /proc")
def test_a_cluster_that_loses_one_instance_after_the_other(tmp_path: Path) -> None:
    cluster, log = tmp_path / "cluster.yaml", tmp_path / "run.jsonl"
    cluster.write_text(CLUSTER)
    with served_model(tmp_path, "--cluster", str(cluster), "--log", str(log)) as served:
        tasks = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children")
        prefill, decode = (int(each) for each in tasks.read_text().split())
        split = answers(served)
        assert len({tuple(each) for each in split}) == len(PROMPTS)
        by_id = {each["instance_id"]: each for each in served.wait_until_idle()["instances"]}
        assert by_id["p"]["num_output_tokens"] == len(PROMPTS)
        assert by_id["d"]["num_output_tokens"] == len(PROMPTS) * 23

        kill_and_wait(served, prefill, "p")
        assert status(served, "/health")[0] == 200
        assert answers(served) == split  # by one instance alone

        # The last one goes in the middle of an answer.
        connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=30)
        with contextlib.closing(connection):
            body = json.dumps({"prompt": [1], "max_tokens": 4000, "stream": True, "ignore_eos": True})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.readline().startswith(b"data: {")
            kill_and_wait(served, decode, "d")
            rest = response.read()
        assert b'"code":503' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        assert status(served, "/health")[0] == 503
        code, said = status(served, "/v1/completions", b'{"prompt": "x"}')
        assert (code, "no instance of the model is left" in said) == (503, True)
        up = [line for line in status(served, "/metrics")[1].splitlines() if line.startswith("sagellm:instance_up{")]
        assert [line.rpartition(" ")[2] for line in up] == ["0.0", "0.0"]
        figures = served.live()
        assert (figures["state"], figures["num_unfinished"]) == ("down", 0)
        assert [each["num_running"] + each["num_blocks_in_use"] for each in figures["instances"]] == [0, 0]
        assert status(served, "/")[0] == 200
    with log.open("rb") as lines:
        result = replay_log(lines, "log")
    assert result.difference is None
    assert result.num_polls > 2 * 24
