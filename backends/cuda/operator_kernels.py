"""The CUDA backend's operators: a Triton kernel where it can compute the case, the reference where it cannot.

This module needs no triton; what it registers imports it.
"""

import importlib.util
from functools import cache
from typing import TYPE_CHECKING

import torch

from backends.cuda.kernel_trial import why_it_fails
from backends.cuda.kernels.tile_shapes import fit_tiles
from backends.operators import reference
from backends.operators.registry import KernelRegistry
from backends.step_inputs import StepInputs

if TYPE_CHECKING:
    from backends.cuda.kernels.paged_attention import StepAttention

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_COMPUTE_CAPABILITY_MIN = (8, 0)  # that Triton compiles for


def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def why_no_kernels(device_index: int) -> str:
    """What keeps Triton from running kernels on the device, which is tried once; empty where nothing does."""
    if torch.cuda.get_device_capability(device_index) < _COMPUTE_CAPABILITY_MIN:
        return "the device is older than compute capability 8.0"
    if not triton_is_installed():
        return "triton is not installed"
    with torch.cuda.device(device_index):
        x = torch.zeros(1, 2, device="cuda")
        reason = why_it_fails(lambda: silu_multiply(x))
    return f"triton cannot compile kernels ({reason})" if reason else ""


def unknown_to_kernels(head_dim: int, num_heads_each: int) -> tuple[str, ...]:
    """See `HardwareBackend.unknown_to_kernels`."""
    return () if fit_tiles(head_dim, num_heads_each) else ("attention",)


def register_kernels(registry: KernelRegistry, backend: str) -> None:
    """Register the Triton kernels."""
    registry.register(backend, "linear", linear)
    registry.register(backend, "rms_norm", rms_norm)
    registry.register(backend, "add_rms_norm", add_rms_norm)
    registry.register(backend, "head_rms_norm", head_rms_norm)
    registry.register(backend, "silu_multiply", silu_multiply)
    registry.register(backend, "rotary_kv_write", rotary_kv_write)
    registry.register(backend, "head_norm_rotary_kv_write", head_norm_rotary_kv_write)
    registry.register(backend, "attention", attention, prepare_attention)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    from backends.cuda.kernels import products

    return products.product(x, weight, bias)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    from backends.cuda.kernels import norms

    if x.dim() == 2 and _is_known(x, weight) and x.shape[1] <= norms.ROW_WIDTH_MAX:
        return norms.rms_norm(x, weight, epsilon=epsilon)
    return reference.rms_norm(x, weight, epsilon=epsilon)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from backends.cuda.kernels import norms

    if x.dim() == 2 and _is_known(x, residual, weight) and x.shape[1] <= norms.ROW_WIDTH_MAX:
        return norms.add_rms_norm(x, residual, weight, epsilon=epsilon)
    return reference.add_rms_norm(x, residual, weight, epsilon=epsilon)


def head_rms_norm(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float) -> torch.Tensor:
    from backends.cuda.kernels import norms

    if x.dim() == 2 and _is_known(x, weight):
        return norms.head_rms_norm(x, weight, epsilon=epsilon)
    return reference.head_rms_norm(x, weight, epsilon=epsilon)


def silu_multiply(x: torch.Tensor) -> torch.Tensor:
    from backends.cuda.kernels import activations

    if x.dim() == 2 and _is_known(x):
        return activations.silu_multiply(x)
    return reference.silu_multiply(x)


def rotary_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    from backends.cuda.kernels import rotary_kv

    run = reference.rotary_kv_write
    if _is_known(query, key, value) and _turns_whole_heads(cos_sin, key_cache, value_cache):
        run = rotary_kv.rotary_kv_write
    return run(query, key, value, positions, cos_sin, key_cache, value_cache, slot_mapping)


def head_norm_rotary_kv_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    epsilon: float,
) -> torch.Tensor:
    from backends.cuda.kernels import rotary_kv

    run = reference.head_norm_rotary_kv_write
    known = _is_known(query, key, value, query_weight, key_weight)
    if known and _turns_whole_heads(cos_sin, key_cache, value_cache):
        run = rotary_kv.head_norm_rotary_kv_write
    return run(
        query,
        key,
        value,
        positions,
        query_weight,
        key_weight,
        cos_sin,
        key_cache,
        value_cache,
        slot_mapping,
        epsilon=epsilon,
    )


def prepare_attention(inputs: StepInputs, *, block_size: int, sliding_window: int = 0) -> "StepAttention":
    from backends.cuda.kernels import paged_attention

    return paged_attention.prepare_attention(inputs, block_size=block_size, sliding_window=sliding_window)


def attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    inputs: "StepInputs | StepAttention",
    *,
    scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    from backends.cuda.kernels import paged_attention

    num_kv_heads, head_dim = key_cache.shape[2:]
    fits = fit_tiles(head_dim, query.shape[1] // head_dim // num_kv_heads)
    if fits and _is_known(query) and _rows_are_dense(key_cache, value_cache):
        return paged_attention.attention(
            query, key_cache, value_cache, inputs, scale=scale, sliding_window=sliding_window
        )
    plain = inputs if isinstance(inputs, StepInputs) else inputs.inputs
    return reference.attention(query, key_cache, value_cache, plain, scale=scale, sliding_window=sliding_window)


def _is_known(*tensors: torch.Tensor) -> bool:
    """One type that the kernels compute in, and elements of a row next to each other."""
    dtype = tensors[0].dtype
    return dtype in _DTYPES and all(tensor.dtype == dtype and tensor.stride(-1) == 1 for tensor in tensors)


def _turns_whole_heads(cos_sin: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    whole = cos_sin.shape[-1] == key_cache.shape[-1] and cos_sin.is_contiguous() and cos_sin.dtype == torch.float32
    return whole and _rows_are_dense(key_cache, value_cache)


def _rows_are_dense(*caches: torch.Tensor) -> bool:
    return all(cache.stride(-1) == 1 for cache in caches)
