"""How attention and products are cut into tiles."""

from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from backends.cuda.kernels.tile_shapes import (
    HOPPER_ROWS,
    PRODUCT_RUN,
    PRODUCT_TILE,
    decode_tile,
    fit_hopper_tiles,
    head_columns,
    hopper_tiles,
    power_of_two_from,
    prefill_tile,
    product_shape,
)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@given(st.sampled_from([16, 64, 80, 128, 256]), st.integers(1, 128), st.sampled_from([2, 4]), st.integers(1, 100_000))
def test_tiles_hold_a_group_and_are_powers_of_two(
    head_dim: int, group: int, element_bytes: int, context_len: int
) -> None:
    heads = (head_dim, group, element_bytes)
    for shape in (prefill_tile(*heads, context_len, False), decode_tile(*heads)):
        assert shape.num_rows >= max(group, 16)
        assert is_power_of_two(shape.num_rows)
        assert is_power_of_two(shape.num_keys)


def test_large_tiles_are_for_long_contexts_on_devices_that_hold_them() -> None:
    sizes = [
        prefill_tile(128, 7, 2, context_len, holds_large_tiles).num_keys
        for context_len, holds_large_tiles in ((1000, True), (8000, True), (8000, False))
    ]
    assert sizes == [64, 128, 64]


@given(st.sampled_from([64, 128]), st.integers(1, 128), st.sampled_from([8, 16, 32, 64]), st.integers(1, 100_000))
def test_tiles_for_hopper_fit_its_shared_memory(head_dim: int, group: int, block_size: int, context_len: int) -> None:
    assert fit_hopper_tiles(head_dim, group, 2, block_size)
    shape = hopper_tiles(context_len)
    assert shape.num_keys % block_size == 0
    row_bytes = 2 * head_dim
    barriers_bytes = 1024
    assert (HOPPER_ROWS + 2 * shape.num_stages * shape.num_keys) * row_bytes + barriers_bytes <= 227 << 10


def test_the_kernel_for_hopper_leaves_other_heads_alone() -> None:
    assert not fit_hopper_tiles(96, 4, 2, 16)
    assert not fit_hopper_tiles(128, 4, 4, 16)
    assert not fit_hopper_tiles(128, 4, 2, 48)
    assert not fit_hopper_tiles(64, 129, 2, 16)


@given(st.integers(1, 32), st.integers(1, 200_000), st.integers(1, 30_000), st.integers(1, 200))
def test_products_of_few_rows_fit_shared_memory_and_every_program_has_a_run(
    num_rows: int, num_columns: int, width: int, num_compute_units: int
) -> None:
    shape = product_shape(num_rows, num_columns, width, num_compute_units)
    assert shape.num_rows >= max(num_rows, 16)
    assert is_power_of_two(shape.num_rows)
    assert shape.num_stages >= 4
    runs_bytes = 2 * shape.num_stages * (PRODUCT_TILE + shape.num_rows) * PRODUCT_RUN
    order_bytes, barriers_bytes = 4 * PRODUCT_TILE * shape.num_rows, 1024
    assert runs_bytes + order_bytes + barriers_bytes <= 227 << 10
    num_tiles = ceil(num_columns / PRODUCT_TILE)
    num_runs = num_tiles * ceil(width / PRODUCT_RUN)
    assert 1 <= shape.num_programs <= min(num_compute_units, num_runs)
    is_shared_evenly = shape.num_programs % num_tiles == 0
    assert is_shared_evenly or shape.num_programs == min(num_compute_units, num_runs)


def test_products_of_a_7b_model_on_132_multiprocessors() -> None:
    programs = [product_shape(32, *weight, 132).num_programs for weight in ((4608, 3584), (3584, 3584), (3584, 18944))]
    assert programs == [132, 112, 112]


@given(st.integers(1, 1 << 20))
def test_power_of_two_from(number: int) -> None:
    power = power_of_two_from(number)
    assert is_power_of_two(power)
    assert power // 2 < number <= power


@given(st.integers(1, 256))
def test_a_tile_holds_a_head_and_is_wide_enough_to_multiply(head_dim: int) -> None:
    columns = head_columns(head_dim)
    assert is_power_of_two(columns)
    assert columns >= max(head_dim, 16)
