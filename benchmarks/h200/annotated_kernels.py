"""Kernels that say to torch's profiler what kind of operator they belong to."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import record_function

from backends.operators.registry import Kernel, KernelRegistry
from benchmarks.h200.step_work import HEAD, OTHER

PREFIX = "kind:"
_KINDS = {
    "linear": "linear",
    "moe_experts": "experts",
    "moe_router": "experts",
    "attention": "attention",
    "add_rms_norm": "norms",
    "rms_norm": "norms",
    "layer_norm": "norms",
    "head_rms_norm": "norms",
    "rotary_kv_write": "rotary and KV write",
    "head_norm_rotary_kv_write": "rotary and KV write",
    "rotary": "rotary and KV write",
    "kv_write": "rotary and KV write",
    "silu_multiply": "activation",
    "silu": "activation",
    "relu": "activation",
    "multiply": "activation",
    "embedding": "embedding and rows",
    "select_rows": "embedding and rows",
    "split": "embedding and rows",
}


class AnnotatedKernels(KernelRegistry):
    """A registry whose kernels run within an annotation of their kind. What they compute is the same.

    The product that makes ``vocab_size`` columns is the head.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._vocab_size = vocab_size

    def kernel(self, backend: str, operator: str) -> Kernel:
        kernel = super().kernel(backend, operator)
        kind = _KINDS.get(operator, OTHER)
        run = self._product(kernel.run) if operator == "linear" else annotated(kind, kernel.run)
        prepare = None if kernel.prepare is None else annotated(kind, kernel.prepare)
        return Kernel(run, prepare)

    def _product(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def product(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> Any:
            with record_function(PREFIX + (HEAD if weight.shape[0] == self._vocab_size else "linear")):
                return run(x, weight, *bias)

        return product


def annotated(kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """The same call within an annotation."""

    def call(*arguments: Any, **attributes: Any) -> Any:
        with record_function(PREFIX + kind):
            return run(*arguments, **attributes)

    return call
