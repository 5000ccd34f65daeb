"""A graph cut into parts computes what it computed whole, and parts of all layers share their code."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.registry import get_backend
from benchmarks.h200.compare_compile import VARIANTS, StepKernels, main, relative_difference
from benchmarks.h200.graph_parts import PartsProgram, cut, make_function
from benchmarks.h200.step_table import Bench
from benchmarks.h200.timed_steps import Step
from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.passes.fusion import fuse

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
STEPS = [Step("decode", 3, 1, 20), Step("prefill", 2, 9, 15)]


def config_file(folder: Path, family: str) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG | {"model_type": family, "head_dim": 8}))
    return str(path)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@torch.no_grad()
def test_parts_give_the_logits_of_the_whole(tmp_path: Path, family: str, variant: str, step: Step) -> None:
    config = load_model_config(config_file(tmp_path, family))
    bench = Bench(config, get_backend("cpu"), STEPS, fuse(build_graph(config)))
    kernels = StepKernels(bench)
    parts = cut(bench.graph, VARIANTS[variant](bench.graph))
    first, *others = [part for part in parts if part.is_compiled]
    assert len(others) == 1
    assert all(part.code == first.code and part.weights != first.weights for part in others)
    assert [node for part in parts for node in part.nodes] == list(bench.graph.nodes)
    inputs = bench.inputs(step)
    expected = bench.program.run(inputs, bench.kv)
    program = PartsProgram(bench.graph, parts, bench.weights, kernels.kernel, kernels.rank)
    function = make_function(first, kernels.rank, kernels.attend, kernels.write_kv)
    keys = [cache.clone() for cache in bench.kv.keys]
    for cache in (*bench.kv.keys, *bench.kv.values):
        cache.flatten(0, 1)[inputs.slot_mapping] = 9.0
    found = program.run(inputs, bench.kv, kernels.step(inputs), function)
    assert relative_difference(found, expected) < 1e-5
    assert all(torch.allclose(*both, atol=1e-5) for both in zip(bench.kv.keys, keys, strict=True))


def test_all_variants_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "compiled.json"
    sizes = ["--batches", "2", "--context", "20", "--prompts", "24", "--budget-s", "0", "--compiler", "eager"]
    assert main([str(out), "--backend", "cpu", "--model", config_file(tmp_path, "qwen2"), *sizes]) == 0
    document = json.loads(out.read_text())
    names = [(row["step"], row["variant"]) for row in document["steps"]]
    variants = ["hand-lowered", *VARIANTS]
    assert names == [(step, variant) for step in ("decode x 2", "prefill 24") for variant in variants]
    assert all(row["launched_ms"] > 0 and row["logits_difference"] < 1e-5 for row in document["steps"])
    assert "prefill 24" in capsys.readouterr().out


def test_no_time_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batches", "2", "--context", "20", "--prompts", "", "--budget-s", "0", "--limit-s", "0"]
    assert main([str(tmp_path / "c.json"), "--backend", "cpu", "--model", config_file(tmp_path, "qwen2"), *sizes]) == 1
    assert capsys.readouterr().out.count("not begun") == len(VARIANTS)
