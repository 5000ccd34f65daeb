"""Which kernel runs an operator on a backend: its own where it has one, the reference elsewhere."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.operators import reference
from backends.operators.reference_attention import prepare_attention

REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Kernel:
    """``run`` has the signature of the operator's reference function.

    ``prepare(inputs, block_size=..., sliding_window=...)`` makes, once for each step, what ``run`` of
    ``attention`` is given in place of the step's inputs; None where it wants those themselves.
    """

    run: Callable[..., Any]
    prepare: Callable[..., Any] | None = None


class KernelRegistry:
    """(backend, operator) -> kernel. Starts with the reference operators; backends add theirs by ``register``."""

    def __init__(self) -> None:
        self._kernels = {(REFERENCE, name): Kernel(getattr(reference, name)) for name in reference.__all__}
        self._kernels[REFERENCE, "attention"] = Kernel(reference.attention, prepare_attention)

    @property
    def operators(self) -> tuple[str, ...]:
        """All operators there are."""
        return tuple(reference.__all__)

    def register(
        self, backend: str, operator: str, run: Callable[..., Any], prepare: Callable[..., Any] | None = None
    ) -> None:
        """Raises ``ValueError`` where there is no such operator, ``run`` does not take the arguments of its
        reference, or the backend has a kernel for it already.
        """
        if (REFERENCE, operator) not in self._kernels:
            raise ValueError(f"operator: {operator!r} is none; operators are {', '.join(self.operators)}")
        wanted = list(inspect.signature(self._kernels[REFERENCE, operator].run).parameters)
        found = list(inspect.signature(run).parameters)
        if found != wanted:
            raise ValueError(f"operator: {operator} of backend {backend!r} takes {found}, must take {wanted}")
        if (backend, operator) in self._kernels:
            raise ValueError(f"operator: {operator} of backend {backend!r} has a kernel already")
        self._kernels[backend, operator] = Kernel(run, prepare)

    def leave_to_reference(self, backend: str, operator: str) -> None:
        """Let the reference run the operator, for a model that the backend's own kernel does not know."""
        self._kernels.pop((backend, operator), None)

    def has_own(self, backend: str, operator: str) -> bool:
        """Whether the backend brought a kernel of its own."""
        return (backend, operator) in self._kernels

    def kernel(self, backend: str, operator: str) -> Kernel:
        """The backend's kernel, or the reference. Raises ``KeyError`` where there is no such operator."""
        own = self._kernels.get((backend, operator))
        return own if own is not None else self._kernels[REFERENCE, operator]
