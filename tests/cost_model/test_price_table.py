"""Prices are exact: a repeated step is a polynomial, and steps compare as they should."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.profile_files import list_profiles, load_profile
from sagellm.cost_model.factory import make_step_cost_model
from sagellm.cost_model.price_table import StepPriceTable, TabulatedStepCost, chunk_attention_fs, interpolated
from sagellm.cost_model.profile import FittedProfile
from sagellm.cost_model.step_cost import StepFeatures
from sagellm.models.known_models import load_model

SMALL = st.integers(0, 10**12)


@st.composite
def price_tables(draw: st.DrawFn) -> StepPriceTable:
    knots = tuple(sorted(draw(st.sets(st.integers(1, 600), min_size=2, max_size=6))))
    values = st.tuples(*[SMALL] * len(knots))
    return StepPriceTable(
        graph_sizes=tuple(sorted(draw(st.sets(st.integers(1, 300), max_size=5)))),
        decode_num_seqs=knots,
        decode_base_fs=draw(values),
        decode_context_fs=draw(values),
        mixed_num_tokens=knots,
        mixed_base_fs=draw(values),
        mixed_floor_fs=draw(SMALL),
        mixed_seq_fs=draw(SMALL),
        mixed_context_fs=draw(SMALL),
        token_pair_fs=draw(SMALL),
        chunk_context_fs=draw(SMALL),
        host_base_fs=draw(SMALL),
        host_seq_fs=draw(SMALL),
        sustained_extra_permille=draw(st.integers(0, 300)),
        sustained_ns=draw(st.integers(1, 10**9)),
    )


@pytest.fixture(scope="module", params=list_profiles())
def shipped(request: pytest.FixtureRequest) -> TabulatedStepCost:
    profile = load_profile(request.param)
    model = profile.model if isinstance(profile, FittedProfile) else load_model("Qwen/Qwen3-8B")
    return make_step_cost_model(profile, model)


@given(price_tables(), st.integers(1, 400), st.integers(0, 10**6), st.integers(1, 60))
def test_walking_steps_equals_jumping_over_them(
    table: StepPriceTable, num_seqs: int, num_context_tokens: int, num_steps: int
) -> None:
    model = TabulatedStepCost(table, "measured", 0)
    first = model.step_cost(StepFeatures(num_seqs, num_context_tokens))
    assert num_steps <= first.linear_repeat_max
    walked = 0
    for step in range(num_steps):
        cost = model.step_cost(StepFeatures(num_seqs, num_context_tokens + step * num_seqs))
        assert cost.device_fs == first.device_fs + step * first.device_growth_fs
        assert (cost.device_growth_fs, cost.host_fs) == (first.device_growth_fs, first.host_fs)
        walked += cost.device_fs
    assert walked == num_steps * first.device_fs + num_steps * (num_steps - 1) // 2 * first.device_growth_fs


@given(price_tables(), st.integers(0, 50), st.lists(st.tuples(st.integers(1, 500), st.integers(0, 9999)), min_size=1))
def test_a_step_with_chunks_is_not_repeated_and_not_below_its_launch(
    table: StepPriceTable, num_decode_seqs: int, chunks: list[tuple[int, int]]
) -> None:
    model = TabulatedStepCost(table, "measured", 0)
    features = StepFeatures(num_decode_seqs, 7 * num_decode_seqs, tuple(chunks))
    cost = model.step_cost(features)
    assert cost.linear_repeat_max == 1
    assert cost.device_fs >= table.mixed_floor_fs
    assert cost == TabulatedStepCost(table, "measured", 0).step_cost(features), "what was asked before changes nothing"


@given(price_tables(), st.integers(1, 5000), st.integers(1, 5000))
def test_causal_attention_does_not_depend_on_where_a_prompt_is_cut(table: StepPriceTable, one: int, two: int) -> None:
    whole = table.token_pair_fs * (one + two) ** 2 // 2
    parts = chunk_attention_fs(table, one, 0) + chunk_attention_fs(table, two, one)
    read_bound = table.chunk_context_fs * one
    assert parts >= whole - 2
    assert parts <= whole + read_bound


@given(price_tables(), st.integers(0, 700))
def test_interpolation_stays_between_its_neighbours(table: StepPriceTable, point: int) -> None:
    knots, values = table.decode_num_seqs, table.decode_base_fs
    value = interpolated(knots, values, point)
    for low, high, left, right in zip(knots, knots[1:], values, values[1:], strict=False):
        if low <= point <= high:
            assert min(left, right) <= value <= max(left, right)
    assert value >= 0


def test_shipped_prices_grow_with_what_is_asked(shipped: TabulatedStepCost) -> None:
    def decode(num_seqs: int, num_context_tokens: int) -> int:
        return shipped.step_cost(StepFeatures(num_seqs, num_context_tokens)).device_fs

    def prefill(num_tokens: int, num_computed_tokens: int = 0) -> int:
        return shipped.step_cost(StepFeatures(0, 0, ((num_tokens, num_computed_tokens),))).device_fs

    assert decode(8, 1000) < decode(8, 100_000)
    assert decode(8, 8000) < decode(256, 8000)
    assert prefill(1024) < prefill(2048) < prefill(8192)
    assert prefill(1024) < prefill(1024, 8192)
    # One step for 64 requests is far cheaper than 64 steps for one.
    assert decode(64, 6400) < 16 * decode(1, 100)


def test_padding_makes_neighbouring_batches_cost_the_same(shipped: TabulatedStepCost) -> None:
    costs = {shipped.step_cost(StepFeatures(num_seqs, 0)).device_fs for num_seqs in range(33, 41)}
    assert len(costs) == (1 if shipped.table.graph_sizes else 8)


@given(price_tables(), st.integers(0, 2 * 10**9), st.integers(0, 10**9))
def test_steps_with_chunks_cost_more_the_longer_they_have_gone_on(
    table: StepPriceTable, prefilling_ns: int, longer_ns: int
) -> None:
    """Up to ``sustained_extra_permille`` more, and never less; decodes cost the same."""
    model = TabulatedStepCost(table, "measured", 0)

    def price_fs(after_ns: int, chunks: tuple[tuple[int, int], ...] = ((100, 50),)) -> int:
        return model.step_cost(StepFeatures(3, 300, chunks, after_ns)).device_fs

    first_fs = price_fs(0)
    assert first_fs <= price_fs(prefilling_ns) <= price_fs(prefilling_ns + longer_ns)
    assert price_fs(table.sustained_ns + longer_ns) == first_fs + first_fs * table.sustained_extra_permille // 1000
    assert price_fs(prefilling_ns, ()) == price_fs(0, ())


def test_tables_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="must be two or more and rise"):
        StepPriceTable((), (2, 1), (0, 0), (0, 0), (1, 2), (0, 0), 0, 0, 0, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="equally long"):
        StepPriceTable((), (1, 2), (0, 0), (0,), (1, 2), (0, 0), 0, 0, 0, 0, 0, 0, 0)
