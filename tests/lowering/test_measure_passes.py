"""The benchmark of passes runs, and finds what every pass saves."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.h200.measure_passes import main

CONFIG: dict[str, Any] = {
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
    sizes = ["--batches", "3", "--context", "20", "--prompts", "24", "--budget-s", "0"]
    main([str(out), "--device", "cpu", "--model", str(config), *sizes])
    document = json.loads(out.read_text())
    measurements = document["measurements"]
    launches = {one["variant"]: one["num_launches"] for one in measurements}
    assert {one["step"] for one in measurements} == {"decode x 3", "prefill 24"}
    assert all(one["launched_ms"] > 0 for one in measurements)
    assert max(launches, key=launches.__getitem__) == "unfused"
    assert min(launches, key=launches.__getitem__) == "all, head norms"
    assert all(one["planned_peak_mib"] < one["unshared_mib"] for one in measurements)
    sends = {one["variant"]: one for one in document["kv_sends"]}
    assert list(sends) == ["no sends", "sends in line", "sends scheduled"]
    assert all(one["launched_ms"] > 0 and one["logits_difference_max"] < 1e-4 for one in sends.values())
    kv_bytes = 24 * 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 4
    assert sends["sends scheduled"]["sent_mib"] * 2**20 == kv_bytes
    printed = capsys.readouterr().out
    assert all(variant in printed for variant in (*launches, *sends))
