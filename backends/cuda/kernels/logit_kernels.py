"""The kernels that a step's drawing takes beside `draw_tokens`."""

from backends.cuda.kernels.drawn_tokens import keep_drawn
from backends.cuda.kernels.token_logprobs import report_logprobs
from backends.cuda.kernels.token_penalties import penalise


class TritonLogitKernels:
    """See `LogitKernels`."""

    penalise = staticmethod(penalise)
    report_logprobs = staticmethod(report_logprobs)
    keep_drawn = staticmethod(keep_drawn)
