"""The operator times that ``benchmarks/h200`` measured, as tables of a profile."""

import csv
import statistics
from pathlib import Path

from sagellm.cost_model.profile import AllReduceTable, GemmCurve, GemmTable

DATA_FOLDER = Path(__file__).parent / "data"
ONE_SHOT_BYTES_MAX = 8 << 20
"""Up to this size vLLM uses its one-shot kernel over peer memory, beyond it NCCL."""


def read_gemm_table(folder: Path) -> GemmTable:
    """Curves of all shapes, uncorrected; a curve measured at fewer sizes is filled in linearly."""
    times: dict[tuple[int, int], dict[int, float]] = {}
    for row in _rows(folder / "gemm.csv"):
        times.setdefault((int(row["n"]), int(row["k"])), {})[int(row["m"])] = float(row["us"])
    num_tokens = tuple(sorted({size for curve in times.values() for size in curve}))
    curves = tuple(
        GemmCurve(n, k, tuple(round(_at(curve, size), 3) for size in num_tokens))
        for (n, k), curve in sorted(times.items())
    )
    return GemmTable(num_tokens, curves, (1,), (1.0,))


def read_all_reduce_table(folder: Path) -> AllReduceTable:
    """One-shot up to ``ONE_SHOT_BYTES_MAX``, NCCL beyond."""
    chosen = [
        (int(row["bytes"]), float(row["us"]))
        for row in _rows(folder / "all_reduce.csv")
        if row["algorithm"] == ("one_shot" if int(row["bytes"]) <= ONE_SHOT_BYTES_MAX else "nccl")
    ]
    chosen.sort()
    return AllReduceTable(tuple(size for size, _ in chosen), tuple(us for _, us in chosen))


def read_qk_norm_ns(folder: Path) -> float:
    """What query and key norms add to a decoder layer: the same layer with them and without, over batches."""
    times: dict[tuple[str, str], float] = {
        (row["model"], row["batch"]): float(row["us_per_layer"]) for row in _rows(folder / "decode_layers.csv")
    }
    without = "qwen3-8b-without-qk-norm"
    added_us = [us - times[without, batch] for (model, batch), us in times.items() if model == "qwen3-8b"]
    return round(statistics.median(added_us) * 1e3)


def _at(curve: dict[int, float], size: int) -> float:
    """Linear between the curve's points, proportional to the size beyond the last one."""
    if size in curve:
        return curve[size]
    below = max(point for point in curve if point < size)
    above = min((point for point in curve if point > size), default=None)
    if above is None:
        return curve[below] * size / below
    share = (size - below) / (above - below)
    return curve[below] + share * (curve[above] - curve[below])


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
