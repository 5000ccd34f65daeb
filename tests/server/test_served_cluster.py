"""``sagellm serve`` with a prefill and a decode process of the toy: what clients get while these come and go."""

import json
import os
import signal
import sys
import time
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


def status(served: ServedModel, path: str) -> int:
    with urllib.request.urlopen(served.url + path, timeout=30) as response:
        code: int = response.status
    return code


def wait_until_lost(served: ServedModel, instance_id: str, is_lost: bool) -> None:
    deadline_s = time.monotonic() + 60
    while {each["instance_id"]: each["is_lost"] for each in served.live()["instances"]}[instance_id] != is_lost:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="children are looked up in /proc")
def test_answers_are_the_same_whoever_is_lost(tmp_path: Path) -> None:
    cluster, log = tmp_path / "cluster.yaml", tmp_path / "run.jsonl"
    cluster.write_text(CLUSTER)
    with served_model(tmp_path, "--cluster", str(cluster), "--log", str(log)) as served:
        tasks = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children")
        _, decode = (int(each) for each in tasks.read_text().split())
        split = answers(served)
        assert len({tuple(each) for each in split}) == len(PROMPTS)
        by_id = {each["instance_id"]: each for each in served.wait_until_idle()["instances"]}
        assert by_id["p"]["num_output_tokens"] == len(PROMPTS)
        assert by_id["d"]["num_output_tokens"] == len(PROMPTS) * 23

        os.kill(decode, signal.SIGKILL)
        wait_until_lost(served, "d", True)
        assert status(served, "/health") == 200
        assert answers(served) == split  # by one instance alone
        wait_until_lost(served, "d", False)
        assert answers(served) == split
        served.wait_until_idle()
    with log.open("rb") as lines:
        result = replay_log(lines, "log")
    assert result.difference is None
    assert result.num_polls > 2 * 24
