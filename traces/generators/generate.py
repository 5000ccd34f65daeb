"""One entry point for all generators."""

import importlib
from dataclasses import replace
from typing import cast

from traces.catalog import GeneratorDescription, find_generator
from traces.errors import TraceError
from traces.generators.contract import GeneratorParameters, TraceGenerator
from traces.request_trace import Trace
from traces.shaping import set_rate

DEFAULT_LENGTHS = "azure-conv"
DEFAULT_CV = 2.0  # the 75th percentile of CVs that ServeGen measured per client
_MODULES = {
    "azure-conv": "azure_conversation",
    "azure-code": "azure_code",
    "mooncake-conv": "mooncake_conversation",
    "mooncake-doc": "mooncake_documents",
    "arxiv-summ": "renewal",
    "poisson": "renewal",
    "gamma": "renewal",
}


def generate(
    name: str,
    *,
    num_requests: int,
    seed: int,
    rate: float | None = None,
    lengths: str | None = None,
    cv: float | None = None,
) -> Trace:
    """Make a trace. Equal arguments give equal traces, in every process.

    Args:
        name: one of ``traces.catalog.list_generators()``.
        num_requests: how many; 1 or more.
        seed: 0 or more.
        rate: mean requests per second from the first arrival to the last; the time axis is scaled to it
            (think times of sessions are not). By default that of the recorded trace.
        lengths: for ``poisson`` and ``gamma``: the name of another generator, for its joint distribution
            of prompt and output tokens, or ``PROMPT:OUTPUT`` for fixed ones, such as ``1024:128``.
            Default ``azure-conv``.
        cv: for ``gamma``: the coefficient of variation of the times between arrivals; 1 is Poisson,
            above 1 bursty. Default 2.

    Raises:
        TraceError: an argument has a wrong value, or one that this generator does not take.
    """
    description = find_generator(name)
    _check_arguments(description, num_requests, seed, lengths, cv)
    # Loaded by name here: a generator may need numpy, whose import takes longer than most commands.
    module = importlib.import_module(f"traces.generators.{_MODULES[name]}")
    generator = cast("TraceGenerator", module.generate_trace)
    parameters = GeneratorParameters(
        name=name,
        num_requests=num_requests,
        seed=seed,
        rate_rps=description.default_rate_rps,
        lengths="arxiv-summ" if name == "arxiv-summ" else lengths or DEFAULT_LENGTHS,
        cv=1.0 if name != "gamma" else DEFAULT_CV if cv is None else cv,
    )
    given = {"num_requests": num_requests, "seed": seed, "rate": rate, "lengths": lengths, "cv": cv}
    source = " ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    trace = replace(generator(parameters), name=name, source=f"{name} {source}")
    return trace if rate is None else set_rate(trace, rate)


def _check_arguments(
    description: GeneratorDescription, num_requests: int, seed: int, lengths: str | None, cv: float | None
) -> None:
    if num_requests < 1:
        raise TraceError(f"the number of requests is {num_requests}, but must be 1 or more")
    if seed < 0:
        raise TraceError(f"the seed is {seed}, but must be 0 or more")
    for parameter, value in (("lengths", lengths), ("cv", cv)):
        if value is not None and parameter not in description.parameters:
            raise TraceError(
                f"{parameter} is {value}, but {description.name} has its own; only poisson and gamma take lengths, "
                f"only gamma takes cv"
            )
    if cv is not None and not 0.01 <= cv <= 100:
        raise TraceError(f"cv is {cv:g}, but must be between 0.01 and 100")
