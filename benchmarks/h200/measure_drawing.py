"""Checks and times what draws tokens on a card: all kinds of sampling, at the vocabulary of Qwen2.5.

    python -m benchmarks.h200.measure_drawing OUT.json [--rows N ...] [--limit-s S]

Logits are of two kinds: *even*, independent normal ones, of which top_p keeps ten thousands; and *peaked*, a few likely
tokens before a long tail in steps of bfloat16, as language models give them. Each kind of sampling is first compared
with torch on the same logits in float64, then timed in device graphs on buffers that together exceed the cache. A case
that fails is told, and the next one goes on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from backends.cuda.kernels.sampling import draw_tokens, draw_with_floors
from backends.cuda.kernels.token_logprobs import report_logprobs
from backends.cuda.kernels.token_penalties import penalise
from backends.model_runner.sampler.cutoff import min_p_floor, top_floor
from backends.model_runner.sampler.gumbel_noise import exponential_noise, token_hashes
from backends.model_runner.sampler.noise_keys import noise_keys
from backends.model_runner.sampler.penalties import penalise_output, penalise_repetition
from benchmarks.h200.measure_kernels import PEAK_BYTES_PER_S, graph_us, rotating

VOCAB_SIZE = 152_064
CONTEXT = 1000
PROMPT = 600
NEAR = 2e-4  # between two values of the race that rounding may swap
NUM_CHECKED_ROWS = 64
DEVICE = torch.device("cuda")

Cuts = tuple[int, float, float]  # top_k, top_p, min_p

CUTS: dict[str, Cuts] = {
    "top_k 1": (1, 1.0, 0.0),
    "top_k 50": (50, 1.0, 0.0),
    "top_k 1000": (1000, 1.0, 0.0),
    "top_p 0.9": (0, 0.9, 0.0),
    "top_p 0.99": (0, 0.99, 0.0),
    "top_k 20, top_p 0.8": (20, 0.8, 0.0),
    "min_p 0.05": (0, 1.0, 0.05),
    "all three": (200, 0.95, 0.01),
}


def even_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, device=DEVICE)


def peaked_logits(num_rows: int) -> torch.Tensor:
    """Normal ones, and for each row's likely tokens logits that fall with the logarithm of their rank."""
    logits = 1.5 * torch.randn(num_rows, VOCAB_SIZE, device=DEVICE)
    places = torch.rand(num_rows, 2000, device=DEVICE).mul_(VOCAB_SIZE).long()
    steepness = torch.linspace(1.0, 3.0, num_rows, device=DEVICE).unsqueeze(1)
    ranks = torch.arange(1, 2001, device=DEVICE)
    logits.scatter_(1, places, 18.0 - steepness * ranks.log())
    return logits.to(torch.bfloat16).to(torch.float32)


LOGITS = {"even": even_logits, "peaked": peaked_logits}


@dataclass(frozen=True, slots=True)
class Row:
    """``floor_us`` is what reading the logits once takes at the memory's speed."""

    kind: str
    logits: str
    num_rows: int
    us: float
    floor_us: float
    error: str


@dataclass(frozen=True, slots=True)
class Draw:
    """What a kind of sampling is called with, for so many rows."""

    temperature: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    cuts: tuple[torch.Tensor, ...]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return draw_tokens(logits, self.temperature, self.seeds, self.positions, *self.cuts)[0]


def draw_of(num_rows: int, temperature: float, cuts: Cuts | None) -> Draw:
    rows = torch.arange(num_rows, device=DEVICE)
    columns = () if cuts is None else tuple(torch.tensor(cut, device=DEVICE).expand(num_rows) for cut in cuts)
    contiguous = tuple(column.contiguous() for column in columns)
    return Draw(torch.full((num_rows,), temperature, device=DEVICE), rows * 977 + 5, rows * 3, contiguous)


# Checks


def check_draw(logits: torch.Tensor, draw: Draw) -> str:
    """The first thing that differs from torch in float64; empty where nothing does."""
    found = draw(logits)
    if not draw.temperature.any():
        is_best = logits.gather(1, found.unsqueeze(1)).squeeze(1) == logits.amax(1)
        return "" if is_best.all() else "not the most likely token"
    scores = logits * (1 / draw.temperature).unsqueeze(1)
    kept = torch.ones_like(scores, dtype=torch.bool)
    error = ""
    if draw.cuts:
        kept, error = kept_and_error(logits, scores, draw)
    keys = torch.from_numpy(noise_keys(draw.seeds.cpu().numpy().view(np.uint64), draw.positions.cpu().numpy()))
    noise = exponential_noise(token_hashes(VOCAB_SIZE, DEVICE), keys.to(DEVICE)).double().log()
    values = (scores.double() - noise).masked_fill_(~kept, -torch.inf)
    behind = values.amax(1) - values.gather(1, found.unsqueeze(1)).squeeze(1)
    num_behind = int((behind > NEAR).sum())
    return f"{num_behind} rows draw another token{error}" if num_behind else error


def kept_and_error(logits: torch.Tensor, scores: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, str]:
    """What the kernel keeps where only rounding can have decided, and how it is wrong elsewhere."""
    top_k, top_p, min_p = draw.cuts
    floors = draw_with_floors(logits, draw.temperature, draw.seeds, draw.positions, *draw.cuts)[2].unsqueeze(1)
    least = min_p_floor(scores.double(), min_p.double().log())
    candidates = scores.double().masked_fill(scores < least - 1e-6, -torch.inf).sort(1, descending=True).values
    every = torch.where(top_k > 0, top_k, VOCAB_SIZE)
    share = torch.where(top_p < 1, top_p.double(), 2.0)
    expected = torch.maximum(least, top_floor(candidates, every, share))
    kept, wanted = scores >= floors, scores >= expected
    # A sum of many likelihoods is rounded, so a set may end a token or a tie earlier or later.
    weights = (scores.double() - scores.amax(1, keepdim=True)).exp()
    off = ((kept != wanted) * weights).sum(1) / (wanted * weights).sum(1)
    nearby = ((kept != wanted) & ((scores - expected).abs() > 1e-5 * scores.abs() + 1e-4)).any(1) & (off > 2e-6)
    num_off = int(nearby.sum())
    return kept, f"; {num_off} rows keep other tokens, {float(off.max()):.1e} of the likelihood" if num_off else ""


def penalty_inputs(num_rows: int) -> tuple[torch.Tensor, ...]:
    rows = torch.arange(num_rows, device=DEVICE)
    table = torch.randint(0, 3000, (num_rows + 3, CONTEXT + 24), dtype=torch.int32, device=DEVICE)
    lengths = torch.full((num_rows,), CONTEXT, device=DEVICE)
    places = torch.stack((rows, rows.flip(0) + 2, lengths - rows % 50, lengths - lengths + PROMPT))
    penalties = torch.tensor([[1.3], [0.5], [0.2]], device=DEVICE).expand(3, num_rows).contiguous()
    return places, penalties, table


def check_penalties(logits: torch.Tensor) -> str:
    places, penalties, table = penalty_inputs(logits.shape[0])
    found, expected = logits.clone(), logits.clone()
    penalise(found, places, penalties, table, CONTEXT)
    rows, table_rows, num_tokens, num_prompt_tokens = places
    token_ids = table[:, :CONTEXT].index_select(0, table_rows).long()
    penalise_repetition(expected, rows, token_ids, num_tokens, penalties[0])
    penalise_output(expected, rows, token_ids, num_tokens, num_prompt_tokens, penalties[1:])
    error = (found - expected).abs().amax().item()
    return "" if error <= 1e-5 else f"off by {error:.2e}"


def check_logprobs(logits: torch.Tensor, num_top: int) -> str:
    num_rows = logits.shape[0]
    rows = torch.arange(0, num_rows, 2, device=DEVICE)
    token_ids = torch.randint(0, VOCAB_SIZE, (num_rows,), device=DEVICE)
    report = torch.full((rows.numel(), 3 + 2 * num_top), -7, dtype=torch.int32, device=DEVICE)
    report_logprobs(logits, rows, token_ids, num_top, report)
    expected = logits[rows].double().log_softmax(1)
    drawn = expected.gather(1, token_ids[rows].unsqueeze(1))
    found_ids, found = report[:, 1::2].long(), report[:, 2::2].contiguous().view(torch.float32)
    raw_drawn = logits[rows].gather(1, token_ids[rows].unsqueeze(1))
    if not torch.equal(report[:, 0], (logits[rows] > raw_drawn).sum(1).int() + 1):
        return "wrong rank"
    errors = (
        (found - expected.gather(1, found_ids)).abs().amax().item(),
        (found[:, :1] - drawn).abs().amax().item(),
        (found[:, 1:] - expected.topk(num_top, 1).values).abs().amax().item(),
    )
    return "" if max(errors) <= 2e-5 else "off by " + ", ".join(f"{error:.1e}" for error in errors)


# Times


def measure(kind: str, logits_name: str, num_rows: int) -> Row:
    """Checked on some of the rows, timed on all."""
    check, call = CASES[kind](num_rows)
    error = check(LOGITS[logits_name](min(num_rows, NUM_CHECKED_ROWS)))
    num_bytes = 4 * num_rows * VOCAB_SIZE
    buffers = [LOGITS[logits_name](num_rows) for _ in range(rotating(num_bytes))]
    us = graph_us([lambda b=buffer: call(b) for buffer in buffers], calls=10, replays=5)  # type: ignore[misc]
    return Row(kind, logits_name, num_rows, us, num_bytes / PEAK_BYTES_PER_S * 1e6, error)


Check = Callable[[torch.Tensor], str]
Call = Callable[[torch.Tensor], object]


def draws(temperature: float, cuts: Cuts | None) -> Callable[[int], tuple[Check, Call]]:
    def case(num_rows: int) -> tuple[Check, Call]:
        def check(logits: torch.Tensor) -> str:
            return check_draw(logits, draw_of(logits.shape[0], temperature, cuts))

        return check, draw_of(num_rows, temperature, cuts)

    return case


def penalises(num_rows: int) -> tuple[Check, Call]:
    inputs = penalty_inputs(num_rows)
    return check_penalties, lambda logits: penalise(logits, *inputs, CONTEXT)


def reports(num_top: int) -> Callable[[int], tuple[Check, Call]]:
    def case(num_rows: int) -> tuple[Check, Call]:
        rows = torch.arange(num_rows, device=DEVICE)
        report = torch.empty(num_rows, 3 + 2 * num_top, dtype=torch.int32, device=DEVICE)

        def check(logits: torch.Tensor) -> str:
            return check_logprobs(logits, num_top)

        return check, lambda logits: report_logprobs(logits, rows, rows, num_top, report)

    return case


CASES: dict[str, Callable[[int], tuple[Check, Call]]] = {
    "greedy": draws(0.0, None),
    "temperature": draws(0.8, None),
    "temperature, cuttable": draws(0.8, (0, 1.0, 0.0)),
    **{name: draws(0.8, cuts) for name, cuts in CUTS.items()},
    "penalties": penalises,
    "5 logprobs": reports(5),
    "20 logprobs": reports(20),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 32, 256))
    parser.add_argument("--limit-s", type=float, default=55.0, help="begin no case after this long")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    rows: list[Row] = []
    # The largest first: it matters most, and what it compiles serves the others.
    for num_rows in sorted(arguments.rows, reverse=True):
        for logits_name in LOGITS:
            for kind in CASES:
                if time.monotonic() - started_s > arguments.limit_s:
                    continue
                torch.manual_seed(0)
                try:
                    row = measure(kind, logits_name, num_rows)
                except Exception as error:  # whatever a case fails with, the others are wanted
                    row = Row(kind, logits_name, num_rows, float("nan"), 0.0, f"{type(error).__name__}: {error}"[:200])
                rows.append(row)
        print(f"{num_rows} rows after {time.monotonic() - started_s:.0f} s", flush=True)
        torch.cuda.empty_cache()
    arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    print_table(rows)
    num_errors = sum(bool(row.error) for row in rows)
    print(f"{len(rows)} cases, {num_errors} with errors, done in {time.monotonic() - started_s:.0f} s")
    return 1 if num_errors else 0


def print_table(rows: list[Row]) -> None:
    columns = sorted({(row.logits, row.num_rows) for row in rows})
    found = {(row.kind, row.logits, row.num_rows): row for row in rows}
    print(f"{'us in a graph':24}" + "".join(f"{f'{name} x {num}':>14}" for name, num in columns))
    for kind in CASES:
        cells = [found.get((kind, *column)) for column in columns]
        print(f"{kind:24}" + "".join(f"{'-' if cell is None else f'{cell.us:.1f}':>14}" for cell in cells))
    for row in rows:
        if row.error:
            print(f"{row.kind}, {row.logits} x {row.num_rows}: {row.error.strip('; ')}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
