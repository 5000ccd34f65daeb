"""Compares attention candidates: the backend's kernels, FlashInfer's, and torch's flash, cuDNN and flex kernels.

    python -m benchmarks.h200.compare_attention OUT.json [--limit-s 120] [--only NAME ...]
    python -m benchmarks.h200.compare_attention OUT.json --markdown

Every candidate's result is first checked against float32 on some rows, after free memory has been filled with what
is not a number. Its time is the median of CUDA graph replays of many calls on rotating buffers larger than the L2
cache, or, where it cannot be captured, of launches one after the other. Bytes are K, V, Q and the result once each,
operations 4 * head_dim for each query head and visible pair; the share of peak is of 4.3 TB/s or 790 TFLOP/s,
whichever is nearer. ``plan us`` is what a library needs on the host before a step, outside the timed region.

Measurements run in a process of their own, which is replaced when one breaks the device or hangs. The fastest is
marked ``>``. With ``--markdown`` nothing is measured: the tables of OUT.json are printed for the documentation.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.h200.attention_candidates import Candidate, NotOfferedError, flex_candidates, torch_candidates
from benchmarks.h200.attention_cases import (
    AttentionBatch,
    AttentionCase,
    Buffers,
    attention_batch,
    cases,
    relative_error,
)
from benchmarks.h200.flashinfer_candidates import flashinfer_candidates
from benchmarks.h200.measure_kernels import PEAK_BYTES_PER_S, PEAK_FLOPS_PER_S, graph_us, rotating

RELATIVE_ERROR_MAX = 1e-2
CALLS = 16
REPLAYS = 7
CALLS_LIMIT_S = 0.2
ANSWER_LIMIT_S = 60.0
FAMILIES: dict[str, Callable[[str], bool]] = {
    "ours": lambda name: name == "ours",
    "FlashInfer": lambda name: name.startswith("flashinfer"),
    "torch, K and V gathered": lambda name: name.endswith(", gathered"),
    "torch, K and V contiguous": lambda name: name.endswith(", contiguous"),
}
FLEX_CASES = ("prompt of 1024", "prompt of 8192")


@dataclass(frozen=True, slots=True)
class Row:
    """A candidate's figures for a case, or in ``failure`` why there are none."""

    model: str
    group: str
    case: str
    candidate: str
    us: float | None
    plan_us: float | None
    is_captured: bool
    tb_per_s: float
    tflop_per_s: float
    share_of_peak: float
    relative_error: float
    failure: str


@dataclass(frozen=True, slots=True)
class Task:
    case: AttentionCase
    candidate: str


@dataclass(frozen=True, slots=True)
class Answer:
    row: Row
    device_is_lost: bool


# Measuring, in the process that has the device


def all_candidates() -> list[Candidate]:
    ours, *others = torch_candidates()
    return [ours, *flashinfer_candidates(), *others, *flex_candidates()]


def serve_measurements(connection: Connection) -> None:
    """Answer tasks until there are no more, or the device is lost. Operands are kept from one task to the next."""
    torch.manual_seed(0)
    candidates = {candidate.name: candidate for candidate in all_candidates()}
    operands = Operands()
    while (task := connection.recv()) is not None:
        row = measured_or_failed(candidates[task.candidate], task.case, operands)
        answer = Answer(row, bool(row.failure) and not device_works())
        connection.send(answer)
        if answer.device_is_lost:
            return


class Operands:
    """The operands of the last case that was asked for."""

    def __init__(self) -> None:
        self._batch: AttentionBatch | None = None

    def of(self, case: AttentionCase) -> AttentionBatch:
        if self._batch is None or self._batch.case != case:
            self._batch = None
            torch.cuda.empty_cache()
            self._batch = attention_batch(case, rotating(case.num_bytes), torch.device("cuda"))
        return self._batch


def measured_or_failed(candidate: Candidate, case: AttentionCase, operands: Operands) -> Row:
    try:
        return measure(candidate, operands.of(case))
    except NotOfferedError as error:
        return failed_row(case, candidate.name, f"not offered: {error}")
    except Exception as error:  # Libraries raise what they like, and the other rows are still wanted.
        text = " ".join(str(error).split())[:160]
        return failed_row(case, candidate.name, f"{type(error).__name__}: {text}")


def measure(candidate: Candidate, batch: AttentionBatch) -> Row:
    prepared = candidate.prepare(batch)
    error = checked_error(prepared.run, batch)
    if not error < RELATIVE_ERROR_MAX:
        return failed_row(batch.case, candidate.name, f"wrong result: relative error {error:.2g}")
    us, is_captured = timed_us([lambda b=buffers: prepared.run(b) for buffers in batch.buffers])
    case = batch.case
    bytes_per_s, flops_per_s = case.num_bytes / us * 1e6, case.num_flops / us * 1e6
    return Row(
        model=case.model,
        group=case.group,
        case=case.name,
        candidate=candidate.name,
        us=us,
        plan_us=prepared.plan_us,
        is_captured=is_captured,
        tb_per_s=bytes_per_s / 1e12,
        tflop_per_s=flops_per_s / 1e12,
        share_of_peak=max(bytes_per_s / PEAK_BYTES_PER_S, flops_per_s / PEAK_FLOPS_PER_S),
        relative_error=error,
        failure="",
    )


def checked_error(run: Callable[[Buffers], torch.Tensor | list[torch.Tensor]], batch: AttentionBatch) -> float:
    buffers = batch.buffers[0]
    poison_free_memory(buffers.query)
    parts = run(buffers)
    output = torch.cat(parts) if isinstance(parts, list) else parts
    if output.shape != buffers.query.shape:
        raise ValueError(f"result has shape {tuple(output.shape)}, the query {tuple(buffers.query.shape)}")
    return relative_error(output, batch, buffers)


def poison_free_memory(query: torch.Tensor) -> None:
    """Leave the allocator with nothing of a result's size but what is not a number."""
    if query.is_cuda:
        torch.cuda.empty_cache()
    poison = [torch.full(query.shape, float("nan"), dtype=query.dtype, device=query.device) for _ in range(4)]
    poison.clear()


def timed_us(runs: list[Callable[[], object]]) -> tuple[float, bool]:
    """Microseconds of a call, and whether a graph of calls could be captured."""
    runs[0]()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    runs[0]()
    torch.cuda.synchronize()
    # A call can keep the host busy for tens of milliseconds (cuDNN may plan anew each time).
    calls = max(2, min(CALLS, int(CALLS_LIMIT_S / (time.perf_counter() - started_s))))
    if calls < CALLS:
        runs = runs[:calls]
    try:
        return graph_us(runs, calls, REPLAYS), True
    except RuntimeError:
        torch.cuda.synchronize()
    return launched_us(runs, calls), False


def launched_us(runs: list[Callable[[], object]], calls: int) -> float:
    rounds = -(-calls // len(runs))
    times_ms = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(rounds):
            for run in runs:
                run()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) * 1000 / (rounds * len(runs))


def failed_row(case: AttentionCase, candidate: str, failure: str) -> Row:
    return Row(case.model, case.group, case.name, candidate, None, None, False, 0.0, 0.0, 0.0, float("nan"), failure)


def device_works() -> bool:
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1.0)
    except RuntimeError:
        return False


# Asking for measurements


class Measurer:
    """The measuring process, started anew after it is lost."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def ask(self, task: Task) -> Row:
        connection = self._connection or self._start()
        try:
            connection.send(task)
            if not connection.poll(ANSWER_LIMIT_S):
                self.stop()
                return failed_row(task.case, task.candidate, f"no answer within {ANSWER_LIMIT_S:.0f} s")
            answer: Answer = connection.recv()
        except (EOFError, OSError):
            self.stop()
            return failed_row(task.case, task.candidate, "the measuring process died")
        if answer.device_is_lost:
            self.stop()
        return answer.row

    def stop(self) -> None:
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> Connection:
        self._connection, theirs = self._context.Pipe()
        self._process = self._context.Process(target=serve_measurements, args=(theirs,), daemon=False)
        self._process.start()
        theirs.close()
        return self._connection


def tasks(only: Iterable[str]) -> list[list[Task]]:
    """The tasks of each case, the cases that flex attention is tried on once more at the end."""
    wanted = [name.lower() for name in only]

    def of(case: AttentionCase, candidates: list[Candidate]) -> list[Task]:
        names = [candidate.name for candidate in candidates]
        return [Task(case, name) for name in names if not wanted or any(name.startswith(start) for start in wanted)]

    flex = flex_candidates()
    plain = all_candidates()[: -len(flex)]
    last = [case for case in cases() if case.name in FLEX_CASES and case.model == "Qwen2.5-7B"]
    return [of(case, plain) for case in cases()] + [of(case, flex) for case in last]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit-s", type=float, default=120.0, help="begin no measurement after this long")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="candidates whose names begin so")
    parser.add_argument("--markdown", action="store_true", help="print the tables of OUT.json; measure nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        rows = [Row(**row) for row in json.loads(arguments.out.read_text(encoding="utf-8"))]
        print("\n\n".join(markdown_tables(rows)))
        return 0
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA device, and attention is measured on one")
    return measure_all(arguments.out, arguments.limit_s, arguments.only)


def measure_all(out: Path, limit_s: float, only: list[str]) -> int:
    started_s = time.monotonic()
    rows: list[Row] = []
    num_left_out = 0
    measurer = Measurer()
    for case_tasks in tasks(only):
        case_rows = []
        for task in case_tasks:
            if time.monotonic() - started_s > limit_s:
                num_left_out += 1
            else:
                case_rows.append(measurer.ask(task))
        if case_rows:
            rows += case_rows
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
            print(case_table(case_rows), f"({time.monotonic() - started_s:.0f} s)\n", flush=True)
    measurer.stop()
    print(winners_table(rows))
    print(f"done in {time.monotonic() - started_s:.0f} s; {num_left_out} measurements left out for lack of time")
    return 0


# Tables


def case_table(rows: list[Row]) -> str:
    lines = [f"{rows[0].model}, {rows[0].group}: {rows[0].case}"]
    lines.append(f"  {'':36}{'us':>9}{'TB/s':>7}{'TFLOP/s':>9}{'peak':>7}{'plan us':>9}  {'':8}  error")
    measured = sorted((row for row in rows if row.us is not None), key=lambda row: row.us or 0.0)
    for row in measured:
        mark = ">" if row is measured[0] else " "
        plan = "" if row.plan_us is None else f"{row.plan_us:.0f}"
        how = "graph" if row.is_captured else "launched"
        lines.append(
            f"{mark} {row.candidate:36}{row.us:9.1f}{row.tb_per_s:7.2f}{row.tflop_per_s:9.1f}{row.share_of_peak:7.0%}"
            f"{plan:>9}  {how:8}  {row.relative_error:.1e}"
        )
    failures: dict[str, list[str]] = {}
    for row in rows:
        if row.us is None:
            failures.setdefault(row.failure, []).append(row.candidate)
    lines += [f"  - {failure} ({'; '.join(names)})" for failure, names in failures.items()]
    return "\n".join(lines)


def winners_table(rows: list[Row]) -> str:
    """Beside the backend's own, the fastest of the others that read the paged cache, and of all others."""
    lines = [f"{'':60}{'ours us':>9}{'peak':>6}   fastest other"]
    for case_rows in by_case(rows):
        ours = next((row for row in case_rows if row.candidate == "ours"), None)
        others = sorted(
            (row for row in case_rows if row.us is not None and row is not ours), key=lambda row: row.us or 0.0
        )
        mine = f"{ours.us:9.1f}{ours.share_of_peak:6.0%}" if ours and ours.us is not None else f"{'-':>9}{'':6}"
        named = [f"{row.us:.1f} {row.candidate}" for row in others]
        paged = [name for row, name in zip(others, named, strict=True) if "contiguous" not in row.candidate]
        best = dict.fromkeys([*named[:1], *paged[:1]])
        case = f"{case_rows[0].model}, {case_rows[0].group}: {case_rows[0].case}"
        lines.append(f"{case:60}{mine}   {'; '.join(best)}")
    return "\n".join(lines)


def by_case(rows: list[Row]) -> list[list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.group, row.case), []).append(row)
    return list(found.values())


def markdown_tables(rows: list[Row]) -> list[str]:
    """For each kind of batch, the fastest kernel of each family: microseconds, share of peak, and its name."""
    tables = []
    for group in dict.fromkeys(row.group for row in rows):
        head = f"| {group}, us and share of peak | {' | '.join(FAMILIES)} | fastest: TB/s | TFLOP/s |"
        body = [markdown_row(of) for of in by_case([row for row in rows if row.group == group])]
        tables.append("\n".join([head, "|---" * (len(FAMILIES) + 3) + "|", *body]))
    return tables


def markdown_row(rows: list[Row]) -> str:
    measured = sorted((row for row in rows if row.us is not None), key=lambda row: row.us or 0.0)
    cells = []
    for belongs in FAMILIES.values():
        best = next((row for row in measured if belongs(row.candidate)), None)
        cells.append("-" if best is None else markdown_cell(best, best is measured[0]))
    model = "" if rows[0].model == "Qwen2.5-7B" else f"{rows[0].model}, "
    rates = f"{measured[0].tb_per_s:.2f} | {measured[0].tflop_per_s:.0f}" if measured else "- | -"
    return f"| {model}{rows[0].case} | {' | '.join(cells)} | {rates} |"


def markdown_cell(row: Row, is_fastest: bool) -> str:
    us = row.us or 0.0
    figure = (f"{us:.1f}" if us < 100 else f"{us:,.0f}") + f", {row.share_of_peak * 100:.0f} %"
    kernel = row.candidate.removeprefix("flashinfer ").removesuffix(", gathered").removesuffix(", contiguous")
    notes = [kernel] * (row.candidate != "ours") + ["launched"] * (not row.is_captured)
    noted = f" ({'; '.join(notes)})" if notes else ""
    return (f"**{figure}**" if is_fastest else figure) + noted


if __name__ == "__main__":
    sys.exit(main())
