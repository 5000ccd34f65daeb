"""Prompt and output lengths, from inverse CDFs and from output quantiles per decile of the prompt.

The tables beside this package, ``data/fit_quantiles.csv`` and ``data/fit_joint_out_given_in.csv``, are
statistics of the traces that they name. A length is drawn by inversion, with its logarithm interpolated
between quantiles. Outputs are drawn given the decile of the prompt, not through a copula: in the Azure
conversation trace the output's mean is not monotone in the prompt (112, 318, 202 tokens by tercile).
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from traces.errors import TraceError

_DATA = Path(__file__).parent.parent / "data"
_TRACES = {
    "azure-conv": "azure2023_conv",
    "azure-code": "azure2023_code",
    "mooncake-conv": "mooncake_conversation",
    "mooncake-doc": "mooncake_synthetic",
    "arxiv-summ": "vidur_arxiv",
}
_FIXED_TOKENS_MAX = 10_000_000

Tokens = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class JointLengths:
    """A joint distribution of prompt and output tokens."""

    prompt_probabilities: _Floats
    prompt_quantiles: _Floats
    bucket_upper_edges: _Floats  # of prompt tokens, but for the last bucket
    output_probabilities: _Floats
    output_quantiles: tuple[_Floats, ...]  # one row per bucket


def draw_lengths(lengths: str, num_requests: int, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """Prompt and output tokens of each request.

    ``lengths`` is a generator's name or ``PROMPT:OUTPUT``. Raises TraceError where it is neither.
    """
    if lengths in _TRACES:
        return draw_joint(load_joint_lengths(_TRACES[lengths]), num_requests, rng)
    prompt, separator, output = lengths.partition(":")
    counts = [int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0 for text in (prompt, output)]
    if not separator or not all(1 <= count <= _FIXED_TOKENS_MAX for count in counts):
        raise TraceError(
            f"lengths is {lengths!r}, but must be PROMPT:OUTPUT in tokens, such as 1024:128, each from 1 to "
            f"{_FIXED_TOKENS_MAX}, or one of {', '.join(_TRACES)}"
        )
    return np.full(num_requests, counts[0], np.int64), np.full(num_requests, counts[1], np.int64)


def draw_joint(joint: JointLengths, num_requests: int, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """Draw pairs by inversion."""
    uniform = rng.random((2, num_requests))
    prompts = _invert(uniform[0], joint.prompt_probabilities, joint.prompt_quantiles)
    buckets = np.searchsorted(joint.bucket_upper_edges, prompts, side="left")
    outputs = np.empty(num_requests, np.int64)
    for bucket, quantiles in enumerate(joint.output_quantiles):
        inside = buckets == bucket
        outputs[inside] = _invert(uniform[1, inside], joint.output_probabilities, quantiles)
    return prompts, outputs


def _invert(uniform: _Floats, probabilities: _Floats, quantiles: _Floats) -> Tokens:
    tokens = np.exp(np.interp(uniform, probabilities, np.log(quantiles)))
    return np.maximum(1, np.rint(tokens)).astype(np.int64)


def load_joint_lengths(trace: str) -> JointLengths:
    """The tables' rows for one trace, by the trace's name in the tables."""
    (prompt_row,) = (row for row in _rows("fit_quantiles.csv") if (row["trace"], row["field"]) == (trace, "in"))
    bucket_rows = [row for row in _rows("fit_joint_out_given_in.csv") if row["trace"] == trace]
    prompt_names = [name for name in prompt_row if name[0] == "p"]
    output_names = [name for name in bucket_rows[0] if name.startswith("out_p")]
    return JointLengths(
        prompt_probabilities=np.array([float(name[1:]) / 100 for name in prompt_names]),
        prompt_quantiles=np.array([float(prompt_row[name]) for name in prompt_names]),
        bucket_upper_edges=np.array([float(row["in_hi"]) for row in bucket_rows[:-1]]),
        output_probabilities=np.array([float(name[5:]) / 100 for name in output_names]),
        output_quantiles=tuple(np.array([float(row[name]) for name in output_names]) for row in bucket_rows),
    )


def _rows(name: str) -> list[dict[str, str]]:
    with (_DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
