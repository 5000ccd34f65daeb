"""From drawn arrays to a trace."""

import numpy as np
import numpy.typing as npt

from traces.columns import requests_from_columns
from traces.generators.lengths import Tokens
from traces.request_trace import Trace


def trace_of(arrival_s: npt.NDArray[np.float64], prompts: Tokens, outputs: Tokens) -> Trace:
    """A trace without sessions; sorted arrivals in seconds, counted anew from the first."""
    arrival_ns = np.rint((arrival_s - arrival_s[0]) * 1e9).astype(np.int64)
    return Trace(name="", requests=requests_from_columns(arrival_ns.tolist(), prompts.tolist(), outputs.tolist()))
