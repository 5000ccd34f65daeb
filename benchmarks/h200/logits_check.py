"""Logits of a lowered graph beside those of transformers, with the same random weights.

The truth is transformers in the next wider type. In the model's own type both are off from it, and ours must not be off
by much more.
"""

import json
import math
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers

from backends.base import HardwareBackend
from backends.weights.load import load_weights
from backends.weights.progress import NoProgress
from benchmarks.h200.paged_steps import Chunk, PagedSequences
from benchmarks.h200.timed_steps import lowered
from sagellm.models.known_models import load_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.passes.early_selection import select_rows_early
from sagellm.runtime.execution_graph.passes.fusion import fuse
from sagellm.runtime.execution_graph.tensors import WeightSource

RATIO_MAX = 1.5
NUM_DECODED = 16


@dataclass(frozen=True, slots=True)
class LogitsError:
    """Of rows of logits against the truth."""

    relative: float  # norm of the difference by the norm of the truth
    share_same_argmax: float


@dataclass(frozen=True, slots=True)
class LogitsCheck:
    """One model. ``decoded`` are the last rows of each prompt, each computed by a step of its own."""

    model: str
    num_layers: int
    dtype: str
    num_rows: int
    transformers: LogitsError
    prefilled: LogitsError
    decoded: LogitsError
    share_same_argmax_as_transformers: float

    @property
    def ratio(self) -> float:
        """How much further off we are than transformers."""
        worst = max(self.prefilled.relative, self.decoded.relative)
        return worst / self.transformers.relative if self.transformers.relative else math.inf

    @property
    def is_kept(self) -> bool:
        return self.ratio <= RATIO_MAX


class StateDict:
    """The weights of a model of transformers, by the names that a checkpoint has."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def check(self, sources: dict[str, WeightSource]) -> None:
        """Raises ``ValueError`` where a tensor is missing or of another shape."""
        for name, source in sources.items():
            found = self._tensors.get(name)
            if found is None or tuple(found.shape) != source.shape:
                shape = None if found is None else tuple(found.shape)
                raise ValueError(f"{name}: transformers has shape {shape}, must be {source.shape}")

    def fill(self, target: torch.Tensor, source: WeightSource, dim: int, first: int, end: int) -> None:
        target.copy_(self._tensors[source.name].narrow(dim, first, end - first))


def check_logits(model: str, num_layers: int, prompt_lens: list[int], backend: HardwareBackend) -> LogitsCheck:
    """``num_layers`` 0: as many as the model has. Needs the memory of the model in the wider type."""
    device = backend.torch_device(0)
    values = config_values(model, num_layers)
    config = parsed(values)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(config.shape.vocab_size, (length,), generator=generator).tolist() for length in prompt_lens
    ]
    reference = reference_model(values, config, device)
    with torch.inference_mode():
        theirs = torch.cat([reference_logits(reference, prompt) for prompt in prompts])
        prefilled, decoded, decoded_rows = own_logits(reference, config, prompts, backend)
        torch.nn.Module.to(reference, torch.float64 if reference.dtype == torch.float32 else torch.float32)
        truth = torch.cat([reference_logits(reference, prompt) for prompt in prompts])
        return LogitsCheck(
            model,
            config.shape.num_layers,
            config.dtype,
            truth.shape[0],
            error_of(theirs, truth),
            error_of(prefilled, truth),
            error_of(decoded, truth[decoded_rows]),
            share_same(prefilled, theirs),
        )


def config_values(model: str, num_layers: int) -> dict[str, Any]:
    """What the ``config.json`` of a known model, or the file at a path, says, with fewer layers where asked for."""
    path = Path(model)
    name = model.rpartition("/")[2].lower()
    shipped = resources.files("sagellm.models").joinpath("configs", f"{name}.json")
    values: dict[str, Any] = json.loads((path if path.is_file() else shipped).read_text(encoding="utf-8"))
    return values | ({"num_hidden_layers": num_layers} if num_layers else {})


def parsed(values: dict[str, Any]) -> ModelConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return load_model_config(str(path))


def reference_model(values: dict[str, Any], config: ModelConfig, device: torch.device) -> transformers.PreTrainedModel:
    """Random: matrices keep the size of what norms give them, norms and biases are such that none goes unnoticed."""
    rest = {key: value for key, value in values.items() if key not in ("model_type", "torch_dtype", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": values.get("rope_theta", 10000.0)}
    described = transformers.AutoConfig.for_model(values["model_type"], **rest, rope_parameters=rope)
    dtype = getattr(torch, config.dtype)
    with device:
        make = transformers.AutoModelForCausalLM.from_config
        model: transformers.PreTrainedModel = make(described, dtype=dtype, attn_implementation="sdpa").eval()  # type: ignore[no-untyped-call]
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                is_bias = name.endswith(".bias")
                parameter.normal_(0.0 if is_bias else 1.0, 0.5 if is_bias else 0.1, generator=generator)
    assert model.dtype == dtype, "transformers takes the type that it is given"
    return model


def reference_logits(model: transformers.PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """[len(prompt), vocab_size] in float32."""
    logits: torch.Tensor = model(torch.tensor([prompt], device=model.device), use_cache=False).logits[0]
    return logits.float()


def own_logits(
    reference: transformers.PreTrainedModel, config: ModelConfig, prompts: list[list[int]], backend: HardwareBackend
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of all rows, computed in one step; of each prompt's last rows, decoded together; and which rows these are."""
    device = backend.torch_device(0)
    graph = select_rows_early(fuse(build_graph(config)))
    supply = StateDict(dict(reference.state_dict()))
    weights = load_weights(graph, supply, rank=0, device=device, progress=NoProgress())
    longest = max(map(len, prompts))
    program = lowered(graph, weights, backend, device, longest)
    cache = PagedSequences(config, len(prompts), longest, device)
    whole = [Chunk(index, prompt, 0) for index, prompt in enumerate(prompts)]
    prefilled = program.run(cache.inputs(whole, all_rows=True), cache.kv)
    # What is decoded is written into the cache again; it was computed by a prefill before.
    starts = [sum(map(len, prompts[:index])) for index in range(len(prompts))]
    decoded, rows = [], []
    for back in range(min(NUM_DECODED, *map(len, prompts)), 0, -1):
        chunks = [Chunk(index, [prompt[-back]], len(prompt) - back) for index, prompt in enumerate(prompts)]
        decoded.append(program.run(cache.inputs(chunks, all_rows=True), cache.kv))
        rows += [start + len(prompt) - back for start, prompt in zip(starts, prompts, strict=True)]
    return prefilled, torch.cat(decoded), torch.tensor(rows, device=device)


def error_of(logits: torch.Tensor, truth: torch.Tensor) -> LogitsError:
    relative = torch.linalg.vector_norm(logits - truth) / torch.linalg.vector_norm(truth)
    return LogitsError(float(relative), share_same(logits, truth))


def share_same(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Of rows with the same most likely token."""
    return float((logits.argmax(-1) == others.argmax(-1)).float().mean())
