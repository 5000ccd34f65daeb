"""From what the user calls a trace to the trace itself."""

import os

from sagellm.cluster.errors import suggestion
from traces.catalog import list_generators
from traces.errors import TraceError
from traces.generators import generate
from traces.reader import read_trace
from traces.request_trace import Trace
from traces.shaping import limit, scale_rate, set_rate

GENERATED_REQUESTS = 2_000
"""How many requests are generated where the user does not say."""


def choose_trace(
    name_or_path: str, *, rate: float | None, rate_scale: float | None, num_requests_max: int | None, seed: int
) -> Trace:
    """The trace in that file or from that generator, cut and then scaled.

    Raises:
        TraceError: there is no such file or generator, or the file is wrong.
    """
    trace = _whole_trace(name_or_path, num_requests_max, seed)
    if rate is not None:
        return set_rate(trace, rate)
    if rate_scale is not None:
        return scale_rate(trace, rate_scale)
    return trace


def _whole_trace(name_or_path: str, num_requests_max: int | None, seed: int) -> Trace:
    generator_names = [generator.name for generator in list_generators()]
    if name_or_path in generator_names:
        return generate(name_or_path, num_requests=num_requests_max or GENERATED_REQUESTS, seed=seed)
    if not os.path.exists(name_or_path):
        raise TraceError(f"{name_or_path}: neither a file nor a generator; {suggestion(name_or_path, generator_names)}")
    trace = read_trace(name_or_path, seed=seed)
    return trace if num_requests_max is None else limit(trace, num_requests_max)
