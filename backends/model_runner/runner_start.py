"""From settings to a runner that serves at once: model loaded, memory taken, kernels compiled, steps captured."""

import sys

import torch

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.model_runner.count_progress import CountProgress
from backends.model_runner.executor_error import ExecutorError
from backends.model_runner.kv_blocks import KVBlocks, kv_block_bytes
from backends.model_runner.loaded_model import LoadedModel, LoadModel
from backends.model_runner.step_runner import StepMemory, StepRunner
from backends.model_runner.warm_up import WarmUp, small_steps, steps_of_serving

_GIB = 1 << 30


def started_runner(
    settings: ExecutorSettings, backend: HardwareBackend, load: LoadModel
) -> tuple[StepRunner, KVBlocks]:
    """A runner on the current stream of the settings' device, and its KV cache, which is empty.

    Raises ExecutorError, or ValueError or BackendError of one sentence, where the model cannot be loaded, or KV
    cache and steps do not fit beside it.
    """
    index = settings.device_indexes[0]
    model = _loaded(settings, backend, load)
    kv = _kv_memory(settings, backend, model)
    capabilities = backend.capabilities(index)
    steps = steps_of_serving if capabilities.concurrent_streams else small_steps
    lots = steps(settings.instance, model.num_positions)
    _warm_up(settings, backend, model, kv, lots)
    # Another one than was warmed up, whose tables have grown as long as any request can be.
    runner = StepRunner(model, kv, backend, index)
    if capabilities.graph_capture:
        runner.decode_graphs.capture(settings.instance.max_num_seqs, sys.stderr)
        # Capturing gave back what the allocator had for large steps.
        _warm_up(settings, backend, model, kv, lots[:1])
    kv.clear()
    return runner, kv


def device_name(settings: ExecutorSettings) -> str:
    """For people: cuda:0."""
    return f"{settings.backend}:{settings.device_indexes[0]}"


def _loaded(settings: ExecutorSettings, backend: HardwareBackend, load: LoadModel) -> LoadedModel:
    try:
        return load(settings, backend)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ExecutorError(
            f"model: the weights of {settings.model} do not fit into the memory of {device_name(settings)}, of which "
            f"{_free_gib(settings, backend):.1f} GiB are free; give it a smaller model or a larger device"
        ) from error


def _kv_memory(settings: ExecutorSettings, backend: HardwareBackend, model: LoadedModel) -> KVBlocks:
    instance, name = settings.instance, device_name(settings)
    shape = (model.num_layers, 2, instance.num_blocks, instance.block_size, model.num_kv_heads, model.head_dim)
    block_bytes = kv_block_bytes(shape, model.kv_dtype)
    needed_gib, free_gib = block_bytes * (instance.num_blocks + 1) / _GIB, _free_gib(settings, backend)
    refusal = ExecutorError(
        f"num_blocks: KV memory of {instance.num_blocks} blocks of {block_bytes} bytes needs {needed_gib:.2f} GiB, "
        f"but {name} has {free_gib:.2f} GiB free beside the weights; "
        f"at most {max(0, int(free_gib * _GIB / block_bytes) - 1)} blocks fit"
    )
    if needed_gib > free_gib:
        raise refusal
    try:
        return KVBlocks(backend, settings.device_indexes[0], shape, model.kv_dtype)
    except MemoryError as error:
        raise refusal from error


def _warm_up(
    settings: ExecutorSettings, backend: HardwareBackend, model: LoadedModel, kv: KVBlocks, lots: tuple[WarmUp, ...]
) -> None:
    instance, index = settings.instance, settings.device_indexes[0]
    progress = CountProgress(sys.stderr, f"{device_name(settings)} warm-up", sum(len(lot.plans) for lot in lots))
    try:
        for lot in lots:
            _run(lot, StepRunner(model, kv, backend, index), backend, settings, progress)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ExecutorError(
            f"num_blocks: {instance.num_blocks} blocks of KV leave too little of {device_name(settings)} for a step "
            f"of {instance.max_num_batched_tokens} tokens; lower num_blocks or max_num_batched_tokens"
        ) from error
    progress.end()


def _run(
    lot: WarmUp, runner: StepRunner, backend: HardwareBackend, settings: ExecutorSettings, progress: CountProgress
) -> None:
    index = settings.device_indexes[0]
    memory = StepMemory(backend, index, settings.instance.max_num_seqs)
    for request in lot.requests:
        runner.requests.add(request, ())
    for plan in lot.plans:
        runner.run(plan, memory)
        backend.synchronize(index)
        progress.advance()


def _free_gib(settings: ExecutorSettings, backend: HardwareBackend) -> float:
    memory = backend.memory_info(settings.device_indexes[0])
    return (memory.free_bytes + memory.reserved_bytes - memory.allocated_bytes) / _GIB
