"""``sagellm serve`` where the device is too small for what the cluster file promises."""

import json
import sys
from pathlib import Path

import pytest
from running_sagellm import sagellm_in_a_process

import backends
from benchmarks.h200.limit_cases import CaseInput, serve_refused

SHEET = Path(backends.__file__).parent / "cpu" / "profiles" / "cpu_spec.json"


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
def test_weights_that_do_not_fit_are_one_line_and_leave_no_process(tmp_path: Path) -> None:
    seen = serve_refused(CaseInput("cpu", tmp_path))
    assert "the weights of Qwen/Qwen2.5-72B take 270.9 GiB, but cpu:0 has" in seen


@pytest.mark.parametrize("options", [(), ("--single-process",)])
def test_kv_that_does_not_fit_says_how_much_does(tmp_path: Path, options: tuple[str, ...]) -> None:
    sheet = json.loads(SHEET.read_text(encoding="utf-8"))
    sheet["device"]["memory_bytes"] = 10**15
    profile = tmp_path / "cpu" / "profiles" / "large.json"
    profile.parent.mkdir(parents=True)
    profile.write_text(json.dumps(sheet), encoding="utf-8")
    cluster = tmp_path / "large.yaml"
    cluster.write_text(f"model: sagellm/toy\ninstances: [{{profile: {profile}, kv_tokens: 1000000000000}}]\n")
    finished = sagellm_in_a_process("serve", "--cluster", cluster, "--host", "127.0.0.1", "--port", "0", *options)
    assert (finished.code, finished.out) == (2, "")
    starting, refusal = finished.err.splitlines()
    assert starting.startswith("Starting 1 x sagellm/toy")
    assert refusal.startswith("sagellm: mixed-0: kv_tokens: 1000000000000 tokens of KV")
    assert " tokens fit" in refusal
