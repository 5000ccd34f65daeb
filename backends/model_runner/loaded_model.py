"""From an instance's settings to a program with its weights on the device."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.lowering.lower import lower
from backends.model_runner.executor_error import ExecutorError
from backends.operators.registry import KernelRegistry
from backends.step_inputs import ModelProgram
from backends.weights.checkpoint import Checkpoint, has_checkpoint
from backends.weights.dummy import DummyWeights
from backends.weights.load import load_weights, weight_bytes
from backends.weights.model_folder import model_folder
from backends.weights.progress import progress_on
from sagellm.models.known_models import load_model_config
from sagellm.models.model_config import ModelConfig
from sagellm.runtime.execution_graph.builder import build_graph
from sagellm.runtime.execution_graph.ir import ExecutionGraph
from sagellm.runtime.execution_graph.passes.early_selection import select_rows_early
from sagellm.runtime.execution_graph.passes.fusion import fuse

_LOG = logging.getLogger(__name__)
_GIB = 1 << 30
_DTYPES = ("bfloat16", "float16", "float32")
_LOAD_FORMATS = ("auto", "dummy", "safetensors")
_WITHOUT_CHECKPOINT = "sagellm/"  # known models that are for random weights only
_NUM_POSITIONS_UNSTATED = 32_768


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A program, and the shape of the KV cache that it works on."""

    program: ModelProgram
    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    kv_dtype: torch.dtype
    num_positions: int  # the longest context that the program can take
    # Attention's work follows the contexts. The reference's, captured, would always be that of the longest context.
    is_worth_capturing: bool = True


LoadModel = Callable[[ExecutorSettings, HardwareBackend], LoadedModel]


def load_model(settings: ExecutorSettings, backend: HardwareBackend) -> LoadedModel:
    """Load or make up the weights, and lower the model's graph for the device.

    Raises ExecutorError, or ValueError of one sentence, where settings, files and device do not fit together.
    """
    if len(settings.device_indexes) != 1:
        raise ExecutorError(
            f"device_indexes: {settings.device_indexes}, must be one device; an instance runs on one for now"
        )
    folder = _weights_folder(settings)
    config = _config(settings, folder)
    device = backend.torch_device(settings.device_indexes[0])
    _check_dtype(config, backend, settings.device_indexes[0])
    graph = select_rows_early(fuse(build_graph(config)))
    _check_room(graph, settings, backend)
    kernels = _kernels(config, settings, backend)
    num_positions = _num_positions(settings, config)
    weights = _weights(graph, settings, folder, device)
    program = lower(graph, weights, kernels=kernels, backend=backend.name, device=device, num_positions=num_positions)
    shape = config.shape
    return LoadedModel(
        program,
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_dim,
        getattr(torch, config.dtype),
        num_positions,
        is_worth_capturing=kernels.has_own(backend.name, "attention"),
    )


def free_bytes(backend: HardwareBackend, device_index: int) -> int:
    """What tensors can still have: what the driver calls free, and what the allocator keeps for them."""
    memory = backend.memory_info(device_index)
    return memory.free_bytes + memory.reserved_bytes - memory.allocated_bytes


def _check_room(graph: ExecutionGraph, settings: ExecutorSettings, backend: HardwareBackend) -> None:
    """Before the first weight is read: a host that gives out memory it does not have would end the process."""
    index = settings.device_indexes[0]
    needed, free = weight_bytes(graph), free_bytes(backend, index)
    if needed > free:
        raise ExecutorError(
            f"model: the weights of {settings.model} take {needed / _GIB:.1f} GiB, but {backend.name}:{index} has "
            f"{free / _GIB:.1f} GiB free; give it a smaller model or a larger device, or end what else uses it"
        )


def _kernels(config: ModelConfig, settings: ExecutorSettings, backend: HardwareBackend) -> KernelRegistry:
    """The backend's own kernels, but for those that do not know the model; where there are such, one line says so."""
    kernels = KernelRegistry()
    backend.register_operators(kernels)
    shape = config.shape
    unknown = [
        operator
        for operator in backend.unknown_to_kernels(shape.head_dim, shape.num_heads // shape.num_kv_heads)
        if kernels.has_own(backend.name, operator)
    ]
    for operator in unknown:
        kernels.leave_to_reference(backend.name, operator)
    if unknown:
        _LOG.warning(
            "%s:%d: torch's operators, which are slower, run %s, and decode steps are not captured: "
            "backend %r has no kernel for %d query heads of size %d to a key-value head",
            backend.name, settings.device_indexes[0], ", ".join(unknown), backend.name,
            shape.num_heads // shape.num_kv_heads, shape.head_dim,
        )  # fmt: skip
    return kernels


def _weights_folder(settings: ExecutorSettings) -> Path | None:
    """Where the weights are; None where they are to be made up."""
    if settings.load_format not in _LOAD_FORMATS:
        raise ExecutorError(f"load_format: {settings.load_format!r}, must be one of {', '.join(_LOAD_FORMATS)}")
    if settings.load_format == "dummy":
        return None
    path = Path(settings.model)
    if settings.load_format == "auto" and settings.model.startswith(_WITHOUT_CHECKPOINT) and not path.exists():
        return None
    if path.is_file():
        raise ExecutorError(
            f"model: {path} describes a model without weights; give the folder that has its safetensors, "
            "or --load-format dummy for random weights"
        )
    folder = model_folder(settings.model)
    if not has_checkpoint(folder):
        raise ExecutorError(
            f"model: {folder} has no safetensors beside its config.json; give a folder that has them, "
            "or --load-format dummy for random weights"
        )
    return folder


def _config(settings: ExecutorSettings, folder: Path | None) -> ModelConfig:
    config = load_model_config(str(folder) if folder is not None else settings.model)
    if settings.dtype == "auto":
        return config
    if settings.dtype not in _DTYPES:
        raise ExecutorError(f"dtype: {settings.dtype!r}, must be auto or one of {', '.join(_DTYPES)}")
    dtype_bytes = 4 if settings.dtype == "float32" else 2
    return replace(config, dtype=settings.dtype, shape=replace(config.shape, dtype_bytes=dtype_bytes))


def _check_dtype(config: ModelConfig, backend: HardwareBackend, device_index: int) -> None:
    dtypes = backend.capabilities(device_index).dtypes
    if config.dtype not in dtypes:
        device = backend.get_device_info(device_index).name
        raise ExecutorError(
            f"dtype: {config.dtype} does not run on {backend.name}:{device_index} ({device}), "
            f"must be one of {', '.join(dtypes)}; give it by --dtype"
        )


def _num_positions(settings: ExecutorSettings, config: ModelConfig) -> int:
    """As many as the settings allow, or the configuration states, or the KV cache holds."""
    instance = settings.instance
    num_positions = settings.max_model_len or config.max_model_len or _NUM_POSITIONS_UNSTATED
    if config.rope is None and num_positions > config.max_model_len:
        raise ExecutorError(
            f"max_model_len: {num_positions}, must be at most {config.max_model_len}, "
            "the number of positions that the model has learned"
        )
    return min(num_positions, instance.num_token_slots)


def _weights(
    graph: ExecutionGraph, settings: ExecutorSettings, folder: Path | None, device: torch.device
) -> dict[str, torch.Tensor]:
    supply = DummyWeights(device, settings.seed) if folder is None else Checkpoint(folder)
    try:
        progress = progress_on(sys.stderr, settings.model)
        return load_weights(graph, supply, rank=0, device=device, progress=progress)
    finally:
        supply.close()
