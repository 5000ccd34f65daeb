"""Reads what was measured: one row per engine step, or one row per online request."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STEP_COLUMNS = ("case", "step", "schedule_us", "duration_us", "num_decode_seqs", "decode_context_tokens")
REQUEST_COLUMNS = ("sent_s", "num_prompt_tokens", "num_output_tokens", "ttft_ms", "e2e_ms")


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One engine step with synchronous scheduling. ``duration_us`` includes ``schedule_us``."""

    case: str
    schedule_us: int
    duration_us: int
    num_decode_seqs: int
    num_decode_context_tokens: int
    chunks: tuple[tuple[int, int], ...]  # (num_tokens, num_computed_tokens)
    steady: bool  # decodes only, of the same requests as the step before it

    @property
    def num_tokens(self) -> int:
        return self.num_decode_seqs + sum(num_tokens for num_tokens, _ in self.chunks)

    @property
    def num_seqs(self) -> int:
        return self.num_decode_seqs + len(self.chunks)

    @property
    def num_token_pairs(self) -> float:
        """Pairs of a chunk's query token and a key that it attends to."""
        return sum(num_tokens * (num_computed + num_tokens / 2) for num_tokens, num_computed in self.chunks)


@dataclass(frozen=True, slots=True)
class MeasuredRequest:
    """One request as an online client saw it. Times in microseconds from the start of the run."""

    sent_us: float
    first_token_us: float
    last_token_us: float
    num_prompt_tokens: int
    num_output_tokens: int


def read_steps(path: Path) -> list[MeasuredStep]:
    """Raises ``ValueError`` naming file and line where a row is not as it should be."""
    steps: list[MeasuredStep] = []

    def add(row: dict[str, str]) -> None:
        chunks = tuple(_parse_chunk(text) for text in row["prefill_chunks"].split(";") if text)
        last = steps[-1] if steps else None
        num_seqs = int(row["num_decode_seqs"])
        same_requests = last is not None and last.case == row["case"] and last.num_decode_seqs == num_seqs
        steady = same_requests and not chunks and last is not None and not last.chunks
        steps.append(
            MeasuredStep(
                case=row["case"],
                schedule_us=int(row["schedule_us"]),
                duration_us=int(row["duration_us"]),
                num_decode_seqs=num_seqs,
                num_decode_context_tokens=int(row["decode_context_tokens"]),
                chunks=chunks,
                steady=steady,
            )
        )

    _read_rows(path, (*STEP_COLUMNS, "prefill_chunks"), add)
    return steps


def read_requests(path: Path) -> list[MeasuredRequest]:
    """Raises ``ValueError`` naming file and line where a row is not as it should be."""
    requests: list[MeasuredRequest] = []

    def add(row: dict[str, str]) -> None:
        sent_us = float(row["sent_s"]) * 1e6
        requests.append(
            MeasuredRequest(
                sent_us=sent_us,
                first_token_us=sent_us + float(row["ttft_ms"]) * 1e3,
                last_token_us=sent_us + float(row["e2e_ms"]) * 1e3,
                num_prompt_tokens=int(row["num_prompt_tokens"]),
                num_output_tokens=int(row["num_output_tokens"]),
            )
        )

    _read_rows(path, REQUEST_COLUMNS, add)
    return requests


def _read_rows(path: Path, columns: tuple[str, ...], add: Callable[[dict[str, str]], None]) -> None:
    try:
        file = path.open(newline="", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}, line 1: column {missing[0]} is missing; needed are {', '.join(columns)}")
        for row in reader:
            try:
                add(row)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def _parse_chunk(text: str) -> tuple[int, int]:
    num_tokens, _, num_computed = text.partition("@")
    return int(num_tokens), int(num_computed)
