"""The table of steps runs on any backend, and counts what the model's shape says."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.h200.step_table import main
from benchmarks.h200.step_work import PEAK_BYTES_PER_S, PEAK_FLOPS_PER_S, Work, work_by_kind
from benchmarks.h200.timed_steps import Step, decode_step, prefill_step
from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.passes.fusion import fuse

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "dtype": "float32",
}


@pytest.mark.parametrize("step", [decode_step(32, 1024), prefill_step(1024), Step("chunk", 1, 512, 2048)])
def test_work_is_that_of_the_formulas(step: Step) -> None:
    """Products and attention of Qwen2.5-7B, written down from its shape."""
    config = load_model_config("Qwen/Qwen2.5-7B")
    found = work_by_kind(fuse(build_graph(config)), step.sizes)
    shape, tokens = config.shape, step.sizes.num_tokens
    hidden, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer_weights = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * shape.intermediate_size
    assert found["linear"].num_flops == 2 * tokens * shape.num_layers * layer_weights
    assert found["head"].num_flops == 2 * step.num_seqs * hidden * shape.vocab_size
    pairs = step.num_seqs * sum(range(step.context_len - step.query_len + 1, step.context_len + 1))
    assert found["attention"].num_flops == 4 * queries * pairs * shape.num_layers
    kv_bytes = 2 * 2 * keys * shape.num_layers * step.num_seqs * step.context_len
    assert found["attention"].num_needed_bytes == kv_bytes
    whole = sum(found.values(), Work())
    assert whole.operators_s >= whole.floor_s >= max(kv_bytes / PEAK_BYTES_PER_S, whole.num_flops / PEAK_FLOPS_PER_S)


def test_every_step_is_timed_and_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out" / "steps.json"
    config.write_text(json.dumps(CONFIG))
    sizes = ["--batches", "3", "--context", "20", "--prompts", "24", "--long-prompt", "64", "--chunk", "32"]
    sizes += ["--long-decodes", "2x64", "--budget-s", "0", "--profile", "decode x 3,prompt 32..64"]
    assert (
        main([str(out), "--backend", "cpu", "--model", str(config), "--perfetto", str(tmp_path / "p.json"), *sizes])
        == 0
    )
    document = json.loads(out.read_text())
    names = ["decode x 3", "prefill 24", "prompt 0..32", "prompt 32..64", "decode x 2 of 64"]
    assert [row["step"] for row in document["steps"]] == names
    assert all(row["launched_ms"] > 0 and row["share_of_peak"] > 0 for row in document["steps"])
    assert [profile["step"] for profile in document["profiles"]] == ["decode x 3", "prompt 32..64"]
    for profile in document["profiles"]:
        assert {row["kind"] for row in profile["kinds"]} >= {"linear", "attention", "norms", "head", "drawing"}
        assert sum(row["ms"] for row in profile["kinds"]) + profile["gaps_ms"] == pytest.approx(profile["span_ms"])
    kept = json.loads((tmp_path / "p.decode-x-3.json").read_text())
    assert any(event.get("name") == "kind:attention" for event in kept["traceEvents"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_what_fails_is_told_and_leaves_the_rest(tmp_path: Path) -> None:
    """A profile of which the folder cannot be made, for want of a worse failure on a CPU."""
    config, out = tmp_path / "config.json", tmp_path / "steps.json"
    config.write_text(json.dumps(CONFIG))
    sizes = ["--batches", "2", "--context", "20", "--prompts", "", "--long-prompt", "0", "--long-decodes", ""]
    profile = ["--profile", "decode x 2", "--perfetto", str(config / "p.json")]
    assert main([str(out), "--backend", "cpu", "--model", str(config), "--budget-s", "0", *sizes, *profile]) == 1
    document = json.loads(out.read_text())
    assert [row["step"] for row in document["steps"]] == ["decode x 2"]
    assert len(document["failures"]) == 1
