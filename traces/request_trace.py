"""A trace: what clients asked for, and when."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One recorded request.

    ``content_ids`` are symbolic ids of the prompt's content, each for ``Trace.content_block_size``
    tokens, the last for what is left over; equal ids mean equal tokens and equal tokens before them.
    ``previous`` is the index in the trace of the request that this one follows in its session, or
    None: it is released at max(its recorded arrival, the previous one's finish + ``gap_ns``).
    """

    arrival_ns: int  # from the start of the trace
    num_prompt_tokens: int
    num_output_tokens: int
    content_ids: tuple[int, ...] = ()
    priority: int = 0
    previous: int | None = None
    gap_ns: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    requests: tuple[TraceRequest, ...]
    content_block_size: int = 0  # tokens per content id; 0 where the trace has no content
    source: str = ""  # file, or generator with its parameters
    notes: tuple[str, ...] = field(default=())  # what the reader changed or guessed, for the report
