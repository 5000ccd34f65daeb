"""The benchmark of passes runs, and finds what every pass saves."""

import json
from pathlib import Path

import pytest

from benchmarks.h200.measure_passes import main

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "dtype": "float32",
}


def test_every_pass_is_timed_and_saves_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out" / "passes.json"
    config.write_text(json.dumps(CONFIG))
    sizes = ["--batches", "1,3", "--context", "20", "--prompts", "24", "--budget-s", "0"]
    main([str(out), "--device", "cpu", "--model", str(config), *sizes])
    measurements = json.loads(out.read_text())["measurements"]
    launches = {one["variant"]: one["num_launches"] for one in measurements}
    assert {one["step"] for one in measurements} == {"decode x 1", "decode x 3", "prefill 24"}
    assert all(one["launched_ms"] > 0 for one in measurements)
    assert max(launches, key=launches.__getitem__) == "unfused"
    assert min(launches, key=launches.__getitem__) == "all, head norms"
    assert all(one["planned_peak_mib"] < one["unshared_mib"] for one in measurements)
    printed = capsys.readouterr().out
    assert all(variant in printed for variant in launches)
