"""From settings to a runner that serves at once: model loaded, memory taken, kernels compiled, steps captured."""

import sys

from backends.base import HardwareBackend
from backends.executor_settings import ExecutorSettings
from backends.model_runner.count_progress import CountProgress
from backends.model_runner.device_failures import CompilerError, compiler_errors, first_line, is_out_of_memory
from backends.model_runner.executor_error import ExecutorError
from backends.model_runner.kv_blocks import KVBlocks, kv_block_bytes
from backends.model_runner.loaded_model import LoadedModel, LoadModel, free_bytes
from backends.model_runner.step_runner import StepMemory, StepRunner
from backends.model_runner.warm_up import WarmUp, small_steps, steps_of_serving

_GIB = 1 << 30
_NUM_LARGE = 2  # of the lots of warming up, the first ones, which take most memory


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
    if capabilities.graph_capture and model.is_worth_capturing:
        _capture(settings, backend, model, kv, runner, lots[:_NUM_LARGE])
    kv.clear()
    return runner, kv


def device_name(settings: ExecutorSettings) -> str:
    """For people: cuda:0."""
    return f"{settings.backend}:{settings.device_indexes[0]}"


def _loaded(settings: ExecutorSettings, backend: HardwareBackend, load: LoadModel) -> LoadedModel:
    try:
        return load(settings, backend)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ExecutorError(
            f"model: the weights of {settings.model} do not fit into the memory of {device_name(settings)}; "
            "give it a smaller model or a larger device, or end what else uses it"
        ) from error


def _kv_memory(settings: ExecutorSettings, backend: HardwareBackend, model: LoadedModel) -> KVBlocks:
    instance, name = settings.instance, device_name(settings)
    shape = (model.num_layers, 2, instance.num_blocks, instance.block_size, model.num_kv_heads, model.head_dim)
    block_bytes = kv_block_bytes(shape, model.kv_dtype)
    # One more than there are is for rows that only fill a batch up.
    num_fitting = max(0, free_bytes(backend, settings.device_indexes[0]) // block_bytes - 1)
    needed_gib, free_gib = block_bytes * (instance.num_blocks + 1) / _GIB, _free_gib(settings, backend)
    refusal = ExecutorError(
        f"kv_tokens: {instance.num_token_slots} tokens of KV ({instance.num_blocks} blocks of {block_bytes} bytes) "
        f"need {needed_gib:.2f} GiB, but {name} has {free_gib:.2f} GiB free beside the weights; at most "
        f"{num_fitting * instance.block_size} tokens fit, and steps need room, too: lower kv_tokens, or "
        "memory_utilization where that is left out"
    )
    if instance.num_blocks > num_fitting:
        raise refusal
    try:
        return KVBlocks(backend, settings.device_indexes[0], shape, model.kv_dtype)
    except MemoryError as error:
        raise refusal from error


def _capture(
    settings: ExecutorSettings,
    backend: HardwareBackend,
    model: LoadedModel,
    kv: KVBlocks,
    runner: StepRunner,
    lots: tuple[WarmUp, ...],
) -> None:
    """Capture decode steps, then have the allocator hold again what large steps need; capturing gave that back.

    Where graphs leave too little for that, they go: the steps ran without them before.
    """
    instance = settings.instance
    try:
        runner.capture_graphs(instance.max_num_batched_tokens, instance.max_num_seqs, sys.stderr)
        _run_all(lots, settings, backend, model, kv, None)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    else:
        runner.warn_of_failed_graphs()
        return
    runner.give_up_graphs(reason)
    _warm_up(settings, backend, model, kv, lots)
    runner.warn_of_failed_graphs()


def _warm_up(
    settings: ExecutorSettings, backend: HardwareBackend, model: LoadedModel, kv: KVBlocks, lots: tuple[WarmUp, ...]
) -> None:
    instance = settings.instance
    progress = CountProgress(sys.stderr, f"{device_name(settings)} warm-up", sum(len(lot.plans) for lot in lots))
    try:
        with compiler_errors():
            _run_all(lots, settings, backend, model, kv, progress)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ExecutorError(
                f"kv_tokens: {instance.num_token_slots} tokens of KV leave too little of {device_name(settings)} for a "
                f"step of {instance.max_num_batched_tokens} tokens and {instance.max_num_seqs} sequences; lower "
                "kv_tokens (or memory_utilization, where that is left out), max_num_batched_tokens or max_num_seqs"
            ) from error
        if isinstance(error, CompilerError):
            raise ExecutorError(
                f"a kernel cannot be compiled for {device_name(settings)} ({first_line(error)}); without triton, "
                "torch's operators run instead, which are slower"
            ) from error
        raise
    finally:
        progress.end()


def _run_all(
    lots: tuple[WarmUp, ...],
    settings: ExecutorSettings,
    backend: HardwareBackend,
    model: LoadedModel,
    kv: KVBlocks,
    progress: CountProgress | None,
) -> None:
    for lot in lots:
        _run(lot, StepRunner(model, kv, backend, settings.device_indexes[0]), backend, settings, progress)


def _run(
    lot: WarmUp,
    runner: StepRunner,
    backend: HardwareBackend,
    settings: ExecutorSettings,
    progress: CountProgress | None,
) -> None:
    index = settings.device_indexes[0]
    memory = StepMemory(backend, index, settings.instance.max_num_seqs)
    for request in lot.requests:
        runner.requests.add(request, ())
    for plan in lot.plans:
        runner.run(plan, memory)
        backend.synchronize(index)
        if progress is not None:
            progress.advance()


def _free_gib(settings: ExecutorSettings, backend: HardwareBackend) -> float:
    return free_bytes(backend, settings.device_indexes[0]) / _GIB
