"""Loading weights: what is refused, and that what is loaded is what the checkpoint holds."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel, make_tiny_model

from backends.weights.checkpoint import INDEX_NAME, Checkpoint, has_checkpoint
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights
from backends.weights.model_folder import model_folder
from backends.weights.progress import NoProgress, ProgressBar, progress_on
from sagellm.runtime.execution_graph.ir import ExecutionGraph

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model("qwen2", tmp_path_factory.mktemp("weights"))


@pytest.fixture
def model(saved_model: TinyModel, tmp_path: Path) -> TinyModel:
    """A copy whose files a test may change."""
    folder = tmp_path / "model"
    shutil.copytree(saved_model.folder, folder)
    return TinyModel(saved_model.reference, folder)


def load(graph: ExecutionGraph, folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_weights(graph, Checkpoint(folder), rank=rank, device="cpu", progress=NoProgress())


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def shard_in_two(folder: Path) -> None:
    """As the Hub keeps big models: two files, and an index of which tensor is where."""
    tensors = load_file(folder / FILE)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    (folder / FILE).unlink()


def test_weights_are_those_of_the_checkpoint(model: TinyModel) -> None:
    expected = load_file(model.folder / FILE)
    weights = load(model.graph(), model.folder)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_shards_with_an_index_are_the_same_weights(model: TinyModel) -> None:
    whole = load(model.graph(), model.folder)
    shard_in_two(model.folder)
    assert has_checkpoint(model.folder)
    in_shards = load(model.graph(), model.folder)
    assert all(torch.equal(whole[name], in_shards[name]) for name in whole)


def test_weights_come_in_the_type_of_the_graph(model: TinyModel) -> None:
    change(model.folder, lambda tensors: tensors.update({k: v.to(torch.bfloat16) for k, v in tensors.items()}))
    assert {tensor.dtype for tensor in load(model.graph(), model.folder).values()} == {torch.float32}


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_hold_all_of_a_weight_between_them(model: TinyModel, tp: int) -> None:
    """Vocabulary rows that fill the last rank up are zeros; 8 ranks share 4 key-value heads in pairs."""
    whole = load(model.graph(), model.folder)
    ranks = [load(model.graph(tp), model.folder, rank) for rank in range(tp)]
    for name, tensor in whole.items():
        parts = [weights[name] for weights in ranks]
        if ".k_proj." in name or ".v_proj." in name:
            parts = parts[:: max(1, tp // 4)]
        if parts[0].shape == tensor.shape:
            assert all(torch.equal(part, tensor) for part in parts)
            continue
        dim = next(dim for dim in range(tensor.dim()) if parts[0].shape[dim] != tensor.shape[dim])
        joined = torch.cat(parts, dim)
        assert torch.equal(joined.narrow(dim, 0, tensor.shape[dim]), tensor)
        assert not joined.narrow(dim, tensor.shape[dim], joined.shape[dim] - tensor.shape[dim]).any()


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.pop(name))


def add_tensor(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.update({name: tensor}))


def cut_file(num_bytes: int) -> Callable[[Path], None]:
    return lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:num_bytes]) and None


def lose_a_shard(folder: Path) -> None:
    shard_in_two(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def empty_index(folder: Path) -> None:
    shard_in_two(folder)
    (folder / INDEX_NAME).write_text("[]")


def shard_without_its_tensor(folder: Path) -> None:
    shard_in_two(folder)
    save_file({"else": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")


DOWN = "model.layers.1.mlp.down_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / FILE).unlink(), "there are no weights; .*load format dummy"),
    "missing": (drop(DOWN), f"tensor {DOWN} is missing; "),
    "shape": (add_tensor(DOWN, torch.ones(48, 79)), rf"tensor {DOWN} has shape \[48, 79\], must be \[48, 80\]"),
    "integers": (add_tensor(DOWN, torch.ones(48, 80, dtype=torch.int8)), f"tensor {DOWN} is of type I8, must be"),
    "foreign": (add_tensor("model.layers.0.q_norm", torch.ones(3)), "no place for tensor model.layers.0.q_norm; "),
    "cut": (cut_file(20_000), "model.safetensors: not a whole safetensors file"),
    "empty": (cut_file(0), "model.safetensors: not a whole safetensors file"),
    "lost shard": (lose_a_shard, "model-00002-of-00002.safetensors: the file is missing"),
    "index": (empty_index, f"{INDEX_NAME}: must be JSON with a weight_map"),
    "wrong shard": (shard_without_its_tensor, "model-00001-of-00002.safetensors: tensor .* is not in the file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_sentence(model: TinyModel, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(model.folder)
    with pytest.raises(ValueError, match=message) as refusal:
        load(model.graph(), model.folder)
    assert "\n" not in str(refusal.value)


def test_a_model_of_another_architecture_is_refused(model: TinyModel) -> None:
    """Biases that Qwen2 has and Llama has not must not be dropped in silence."""
    config = json.loads((model.folder / "config.json").read_text())
    (model.folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match=r"no place for tensor .*\.bias and 8 more"):
        load(model.graph(), model.folder)


def test_a_folder_is_its_own_and_an_unreachable_id_says_so(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_folder(str(model.folder)) == model.folder
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'nobody/nothing' is no folder, and the Hub did not give it") as refusal:
        model_folder("nobody/nothing")
    assert "\n" not in str(refusal.value)


def test_dummy_weights_are_the_same_for_one_seed_however_divided(model: TinyModel) -> None:
    def dummy(tp: int, rank: int, seed: int) -> dict[str, torch.Tensor]:
        supply = DummyWeights("cpu", seed)
        return load_weights(model.graph(tp), supply, rank=rank, device="cpu", progress=NoProgress())

    whole, again, other = dummy(1, 0, 7), dummy(1, 0, 7), dummy(1, 0, 8)
    half = dummy(2, 1, 7)
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not torch.equal(whole[gate], other[gate])
    assert not torch.equal(whole[gate], whole["model.layers.1.mlp.gate_proj.weight"])
    assert torch.equal(half[gate], whole[gate][40:])
    assert torch.equal(half[DOWN], whole[DOWN][:, 40:])
    assert (whole["model.norm.weight"] == 1).all()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_terminals_and_for_big_loads_only() -> None:
    assert isinstance(progress_on(io.StringIO(), "weights"), NoProgress)
    big, small = Terminal(), Terminal()
    for stream, num_bytes in ((big, 4 << 30), (small, 4 << 20)):
        progress = progress_on(stream, "weights")
        assert isinstance(progress, ProgressBar)
        progress.begin(num_bytes)
        for _ in range(4):
            progress.advance(num_bytes // 4)
        progress.end()
    assert small.getvalue() == ""
    assert big.getvalue().endswith(f"weights [{'#' * 30}] 4.3 / 4.3 GB\n")


def test_the_same_weights_in_another_form_are_not_looked_at(model: TinyModel) -> None:
    save_file({"tok_embeddings.weight": torch.ones(2)}, model.folder / "consolidated.safetensors")
    assert load(model.graph(), model.folder).keys() == load_file(model.folder / FILE).keys()
