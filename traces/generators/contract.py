"""What every generator is given, and gives."""

from dataclasses import dataclass
from typing import Protocol

from traces.request_trace import Trace


@dataclass(frozen=True, slots=True)
class GeneratorParameters:
    """Checked arguments. A generator reads those that it knows."""

    name: str
    num_requests: int
    seed: int
    rate_rps: float
    lengths: str
    cv: float


class TraceGenerator(Protocol):
    """A module's ``generate_trace``. The name and the source of the trace are filled in by the caller."""

    def __call__(self, parameters: GeneratorParameters) -> Trace: ...
