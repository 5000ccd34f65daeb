"""The check of outputs passes where they are right, and does not where they are not."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from backends.executor_settings import ExecutorSettings
from backends.registry import get_backend
from benchmarks.h200 import text_check
from benchmarks.h200.check_outputs import main
from benchmarks.h200.logits_check import StateDict, check_logits
from benchmarks.h200.paged_steps import Chunk, PagedSequences
from benchmarks.h200.text_check import EagerTexts, check_texts, compared
from sagellm.models.known_models import load_model_config
from sagellm.runtime.execution_graph.tensors import WeightSource

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def test_right_outputs_are_kept(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out" / "checked.json"
    logits = ["--logits", "sagellm/toy:1", f"{model}:0", "--prompts", "5", "40"]
    texts = ["--texts", model, "--num-texts", "5", "--num-tokens", "12"]
    assert main([str(out), "--backend", "cpu", *logits, *texts]) == 0
    document = json.loads(out.read_text())
    assert document["kept"]
    assert [(check["num_layers"], check["num_rows"]) for check in document["logits"]] == [(1, 45), (2, 45)]
    assert [check["eager"] for check in document["texts"]] == ["own kernels", "reference operators"]
    assert all(check["num_texts"] == 5 and check["num_different_tokens"] > 5 for check in document["texts"])
    assert capsys.readouterr().out.endswith("\nkept\n")


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "post_attention_layernorm.weight"])
def test_a_wrong_weight_is_found(model: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StateDict.fill

    def wrong(self: StateDict, target: torch.Tensor, source: WeightSource, dim: int, first: int, end: int) -> None:
        right(self, target, source, dim, first, end)
        if source.name == f"model.layers.1.{name}":
            target.fill_(0.0 if name.endswith("bias") else 1.0)

    monkeypatch.setattr(StateDict, "fill", wrong)
    assert not check_logits(model, 0, [30], get_backend("cpu")).is_kept


def test_what_fails_is_told(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "checked.json"
    assert main([str(out), "--backend", "cpu", "--logits", "no/model:2", f"{model}:0", "--texts"]) == 1
    document = json.loads(out.read_text())
    assert not document["kept"]
    assert len(document["failures"]) == len(document["logits"]) == 1
    assert "logits of no/model:2" in capsys.readouterr().err


def test_texts_that_part_are_close_or_not() -> None:
    """One is equal, one parts at a tie, one where the eager path was sure."""
    logits = torch.zeros(3, 4)
    logits[:, 0], logits[1, 1], logits[2, 1] = 4.0, 3.99, 3.0
    eager = EagerTexts([[0], [0], [0]], [logits])
    found = compared("m", "eager", [[0], [1], [1]], eager, noise=0.01, dtype="bfloat16")
    assert (found.num_equal, found.num_close, found.is_kept) == (1, 1, False)
    assert [(parting.prompt, parting.spacings) for parting in found.partings] == [(1, pytest.approx(0.32)), (2, 32.0)]
    assert found.gaps() == {1: 1, 32: 1}
    assert compared("m", "eager", [[0], [1], [0]], eager, noise=0.01, dtype="bfloat16").is_kept
    assert compared("m", "eager", [[0], [0], [1]], eager, noise=0.13, dtype="bfloat16").is_kept
    with pytest.raises(ValueError, match="zip"):
        compared("m", "eager", [[0], [0], [0, 0]], eager, noise=0.01, dtype="bfloat16")


def test_an_instance_that_draws_other_tokens_is_found(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are of another seed."""
    right = text_check.settings_of

    def wrong(*arguments: Any) -> ExecutorSettings:
        return msgspec.structs.replace(right(*arguments), seed=1)

    monkeypatch.setattr(text_check, "settings_of", wrong)
    assert not any(check.is_kept for check in check_texts(model, 4, 3, get_backend("cpu")))


def test_chunks_become_a_step(model: str) -> None:
    cache = PagedSequences(load_model_config(model), 3, 40, torch.device("cpu"))
    chunks = [Chunk(2, [7], 16), Chunk(0, [8], 0), Chunk(1, [1, 2, 3], 15)]
    inputs = cache.inputs(chunks, all_rows=False)
    assert inputs.positions.tolist() == [16, 0, 15, 16, 17]
    assert (inputs.num_decodes, inputs.query_len_max, inputs.context_len_max) == (2, 3, 18)
    assert inputs.sampled_rows.tolist() == [0, 1, 4]
    assert inputs.context_lens.tolist() == [17, 1, 18]
    last = inputs.block_tables[2].tolist()
    assert inputs.slot_mapping[2:].tolist() == [last[0] * 16 + 15, last[1] * 16, last[1] * 16 + 1]
    assert len(set(inputs.block_tables.flatten().tolist())) == 9
