"""A profile from a server's own log, and from what its clients saw meanwhile.

An executor that is measured by itself has its process, and often its processor, to itself. Served, it shares
them with the driver around it, with the front process and, on one machine, with the clients. A price that is
fitted to steps of a server holds all of that, at loads like those that it was fitted to; and what a request
needs on its way in and out is what its client waited longer than its steps took.
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost
from sim.calibration.served_log import LoggedReplay
from sim.calibration.sustained_fit import fit_sustained_table
from sim.calibration.table_fit import StepErrors, price_us, step_errors
from sim.calibration.timed_steps import TimedStep

REQUESTS_MIN = 5
"""Fewer say nothing of what a request needs on its way."""


@dataclass(frozen=True, slots=True)
class ServedReplay:
    """A replay as the server's log has it, and each request's TTFT as its client saw it, in milliseconds."""

    logged: LoggedReplay
    ttft_ms: Mapping[int, float]

    def overheads_us(self) -> list[float]:
        """For each request what its client waited for the first token beyond queueing and computing."""
        return [
            1e3 * self.ttft_ms[index] - request.inner_ttft_ns / 1e3
            for index, request in self.logged.requests.items()
            if index in self.ttft_ms and request.first_end_ns
        ]


@dataclass(frozen=True, slots=True)
class ServingFit:
    """Prices of steps as they are served, and of a request's way in and out (HTTP, queues, processes, client)."""

    table: StepPriceTable
    request_us: float
    num_steps: int
    num_requests: int
    errors: tuple[StepErrors, ...]  # of the table, on the very steps


def fit_serving(replays: Sequence[ServedReplay]) -> ServingFit:
    """All replays together; where they differ in how long the same steps took, the middle one counts.

    Raises:
        ValueError: they have too few steps of a kind, or too few requests that completed.
    """
    steps = [step for replay in replays for step in replay.logged.steps]
    num_requests = sum(len(replay.overheads_us()) for replay in replays)
    if num_requests < REQUESTS_MIN:
        raise ValueError(
            f"{num_requests} requests are in both the log and the client's records; the fit needs "
            f"{REQUESTS_MIN} or more"
        )
    return adjusted(ServingFit(fit_sustained_table(steps), 0.0, len(steps), num_requests, ()), replays)


def adjusted(fit: ServingFit, replays: Sequence[ServedReplay]) -> ServingFit:
    """The fit with its prices scaled to what the steps of these replays took, and with their requests' overhead.

    Where a machine is slower at one time than at another, replays of about the same time tell by how much.
    """
    steps = [step for replay in replays for step in replay.logged.steps]
    table = _of_equal_sum(fit.table, replays)
    request_us = statistics.median(_trimmed_mean(some) for replay in replays if (some := replay.overheads_us()))
    return replace(fit, table=table, request_us=max(0.0, request_us), errors=tuple(step_errors(table, steps)))


def _of_equal_sum(table: StepPriceTable, replays: Sequence[ServedReplay]) -> StepPriceTable:
    """The table made to give what a replay's decodes took all together, and so what its steps with chunks took.

    The fit counts steps that took far longer than others as less than they were. Yet a request waits for
    them, too, and what counts for it is the sum.
    """
    decodes = [[step for step in replay.logged.steps if not step.features.chunks] for replay in replays]
    others = [[step for step in replay.logged.steps if step.features.chunks] for replay in replays]
    decode = statistics.median(time_ratio(table, steps) for steps in decodes if steps)
    mixed = statistics.median(time_ratio(table, steps) for steps in others if steps)
    return replace(
        table,
        decode_base_fs=tuple(round(price * decode) for price in table.decode_base_fs),
        decode_context_fs=tuple(round(price * decode) for price in table.decode_context_fs),
        mixed_base_fs=tuple(round(price * mixed) for price in table.mixed_base_fs),
        mixed_seq_fs=round(table.mixed_seq_fs * mixed),
        mixed_context_fs=round(table.mixed_context_fs * mixed),
        token_pair_fs=round(table.token_pair_fs * mixed),
    )


def _trimmed_mean(values: Sequence[float]) -> float:
    """Without the highest and the lowest twentieth."""
    num_left_out = len(values) // 20
    return statistics.fmean(sorted(values)[num_left_out : len(values) - num_left_out])


def time_ratio(table: StepPriceTable, steps: Sequence[TimedStep]) -> float:
    """How much longer the steps took, all together, than the table says."""
    model = TabulatedStepCost(table, "measured", 0)
    return sum(step.device_us for step in steps) / sum(price_us(model, step.features) for step in steps)


def read_client_ttft_ms(path: Path) -> dict[int, float]:
    """From ``sagellm replay --on URL --requests FILE``: requests that completed, by their number in the trace.

    Raises ValueError where the file is not of that form.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {int(row["request_id"]): float(row["ttft_ms"]) for row in csv.DictReader(file) if row["e2el_ms"]}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the requests of a replay") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not what `sagellm replay --requests` writes ({error!r})") from error
