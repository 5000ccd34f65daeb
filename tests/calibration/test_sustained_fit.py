"""What steps cost more in a series is told apart from what they cost by themselves."""

from dataclasses import replace
from random import Random

import pytest

from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost
from sagellm.cost_model.step_cost import StepFeatures
from sim.calibration.sustained_fit import fit_sustained_table
from sim.calibration.table_fit import fit_table, price_us
from sim.calibration.timed_steps import TimedStep

TABLE = StepPriceTable(
    graph_sizes=(),
    decode_num_seqs=(1, 256),
    decode_base_fs=(4 * 10**12, 8 * 10**12),
    decode_context_fs=(12_000_000, 12_000_000),
    mixed_num_tokens=(1, 2048),
    mixed_base_fs=(4 * 10**12, 40 * 10**12),
    mixed_floor_fs=0,
    mixed_seq_fs=10**10,
    mixed_context_fs=0,
    token_pair_fs=1_000_000,
    chunk_context_fs=0,
    host_base_fs=0,
    host_seq_fs=0,
)


def served_steps(table: StepPriceTable, num_steps: int, noise: float) -> list[TimedStep]:
    """Series of prompts of any length between decodes, as the table prices them and the noise scatters them."""
    rng, model = Random(1), TabulatedStepCost(table, "measured", 0)
    steps: list[TimedStep] = []
    prefilling_ns = 0
    while len(steps) < num_steps:
        has_chunk = rng.random() < (0.7 if prefilling_ns else 0.3)
        num_decodes = rng.randint(1, 200)
        chunks = ((rng.randint(1, 1_800), rng.choice((0, 500, 4_000))),) if has_chunk else ()
        features = StepFeatures(num_decodes, num_decodes * rng.randint(100, 2_000), chunks, prefilling_ns)
        device_us = price_us(model, features) * rng.uniform(1 - noise, 1 + noise)
        steps.append(TimedStep(features, device_us))
        prefilling_ns = prefilling_ns + round(1e3 * device_us) if has_chunk else 0
    return steps


@pytest.mark.parametrize(("extra_permille", "sustained_ms"), [(80, 40), (150, 100), (30, 200)])
def test_a_planted_ramp_is_found(extra_permille: int, sustained_ms: int) -> None:
    truth = replace(TABLE, sustained_extra_permille=extra_permille, sustained_ns=sustained_ms * 1_000_000)
    found = fit_sustained_table(served_steps(truth, 4_000, noise=0.03))
    true_model, model = TabulatedStepCost(truth, "measured", 0), TabulatedStepCost(found, "measured", 0)
    for prefilling_ms in (0, sustained_ms // 2, 2 * sustained_ms):
        features = StepFeatures(100, 100_000, ((1_000, 500),), prefilling_ms * 1_000_000)
        assert price_us(model, features) == pytest.approx(price_us(true_model, features), rel=0.015), prefilling_ms


def test_where_nothing_rises_next_to_nothing_is_found() -> None:
    found = fit_sustained_table(served_steps(TABLE, 4_000, noise=0.03))
    assert found.sustained_extra_permille <= 5


def test_too_few_series_say_nothing() -> None:
    steps = served_steps(replace(TABLE, sustained_extra_permille=200, sustained_ns=10**7), 60, noise=0.0)
    assert fit_sustained_table(steps) == fit_table(steps)
