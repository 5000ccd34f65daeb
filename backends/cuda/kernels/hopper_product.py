"""Products of few rows and a large weight on Hopper: what `linear` computes.

With few rows a product takes as long as its weight takes to be read. The weight is cut into tiles of rows, and these
into runs of columns; every program gets an equal share of all runs, beginning and ending in the middle of a tile where
it must (Osama et al. 2023, Stream-K, arXiv:2301.03598): so all multiprocessors read until the end. In a program one
warp has the tensor memory accelerator copy runs into shared memory, as far ahead as there is room, and four warps
multiply: the weight's rows are the rows of their products, x's the columns. Of a tile that several programs have parts
of, the last to be done adds all up, in the order of the programs: results are the same each time.

Copies of the weight do not wait for the kernel in front, which writes x (`early_start`): shared memory is full of it by
the time that x is there.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Capitals name what is fixed when a kernel is compiled; triton gives types to the rest.

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from backends.cuda.kernels.kernel_launcher import KernelLauncher
from backends.cuda.kernels.shared_layouts import SWIZZLED, swizzled_layout
from backends.cuda.kernels.tile_shapes import PRODUCT_RUN, PRODUCT_TILE, ProductShape

REGISTERS_OF_COPIES = gl.constexpr(40)
REGISTERS = 128
PARTS_AT_ONCE = gl.constexpr(4)  # that are on their way together


@gluon.jit
def _share_of(program, num_runs):
    """The first run of a program's share."""
    return (program.to(gl.int64) * num_runs // gl.num_programs(0)).to(gl.int32)


@gluon.jit
def _program_with(run, num_runs):
    """Whose share a run is in."""
    return (((run + 1).to(gl.int64) * gl.num_programs(0) - 1) // num_runs).to(gl.int32)


@gluon.jit
def _copy_run(
    source, first_row, first_column, ready, pages, stage, RUN: gl.constexpr,
):  # fmt: skip
    """Have a run of columns copied, SWIZZLED of them at a time."""
    for half in gl.static_range(RUN // SWIZZLED):
        place = pages.index(stage * (RUN // SWIZZLED) + half)
        tma.async_copy_global_to_shared(source, [first_row, first_column + half * SWIZZLED], ready, place)


@gluon.jit
def _copy_runs(
    x, weight, weight_pages, x_pages, ready, free, num_runs, runs_each,
    TILE: gl.constexpr, ROWS: gl.constexpr, RUN: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The part that fills shared memory. The weight is there before the kernel before has written x."""
    begin = _share_of(gl.program_id(0), num_runs)
    end = _share_of(gl.program_id(0) + 1, num_runs)
    num_first = gl.minimum(end - begin, STAGES)
    for count in range(num_first):
        run = begin + count
        mbarrier.expect(ready.index(count), (TILE + ROWS) * RUN * 2)
        _copy_run(weight, run // runs_each * TILE, run % runs_each * RUN, ready.index(count), weight_pages, count, RUN)
    if EARLY:
        gdc_wait()
    for count in range(num_first):
        run = begin + count
        _copy_run(x, 0, run % runs_each * RUN, ready.index(count), x_pages, count, RUN)
    for count in range(num_first, end - begin):
        run = begin + count
        stage, phase = count % STAGES, count // STAGES & 1
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(ready.index(stage), (TILE + ROWS) * RUN * 2)
        _copy_run(weight, run // runs_each * TILE, run % runs_each * RUN, ready.index(stage), weight_pages, stage, RUN)
        _copy_run(x, 0, run % runs_each * RUN, ready.index(stage), x_pages, stage, RUN)


@gluon.jit
def _write(result, out, bias, tile, num_rows, num_columns, HAS_BIAS: gl.constexpr):
    """A tile of the result [TILE, ROWS], which is the output's other way round."""
    height: gl.constexpr = result.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [height // 8, 256 // height], [1, 4], [0, 1])
    columns = tile * height + gl.arange(0, height, gl.SliceLayout(1, layout))
    rows = gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
    wide = gl.convert_layout(result, layout)
    if HAS_BIAS:
        wide += gl.load(bias + columns, mask=columns < num_columns, other=0.0).to(gl.float32)[:, None]
    places = rows.to(gl.int64)[None, :] * num_columns + columns[:, None]
    inside = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    gl.store(out + places, wide.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _multiply_runs(
    out, bias, parts, counts, weight_tiles, x_tiles, ready, free, num_runs, runs_each,
    num_rows, num_columns,
    TILE: gl.constexpr, ROWS: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """The part that multiplies, and adds up what others have multiplied of its tiles where it is the last."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    tile_rows = gl.arange(0, TILE, gl.SliceLayout(1, layout))
    columns = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    part_places = tile_rows[:, None] * ROWS + columns[None, :]
    program = gl.program_id(0)
    begin = _share_of(program, num_runs)
    end = _share_of(program + 1, num_runs)
    for tile in range(begin // runs_each, gl.cdiv(end, runs_each)):
        first_run = gl.maximum(begin, tile * runs_each)
        end_run = gl.minimum(end, (tile + 1) * runs_each)
        result = gl.zeros([TILE, ROWS], gl.float32, layout)
        for run in range(first_run, end_run):
            count = run - begin
            stage = count % STAGES
            mbarrier.wait(ready.index(stage), count // STAGES & 1)
            weight_tile, x_tile = weight_tiles.index(stage), x_tiles.index(stage)
            result = warpgroup_mma(weight_tile, x_tile.permute([1, 0]), result, is_async=True)
            result = warpgroup_mma_wait(1, [result])
            if run > first_run:
                mbarrier.arrive(free.index((count - 1) % STAGES))
        result = warpgroup_mma_wait(0, [result])
        mbarrier.arrive(free.index((end_run - 1 - begin) % STAGES))
        is_written = end_run - first_run == runs_each
        if end_run - first_run < runs_each:
            # Of a program's parts of tiles, the first is where its share begins, and there is at most one more.
            own_place = 2 * program + (first_run > begin).to(gl.int32)
            gl.store(parts + own_place.to(gl.int64) * (TILE * ROWS) + part_places, result)
            gl.thread_barrier()
            first_program = _program_with(tile * runs_each, num_runs)
            last_program = _program_with((tile + 1) * runs_each - 1, num_runs)
            num_done = gl.atomic_add(counts + tile, 1, sem="acq_rel", scope="gpu")
            is_written = num_done == last_program - first_program
            if is_written:
                gl.store(counts + tile, 0)
                result = gl.zeros([TILE, ROWS], gl.float32, layout)
                for first in range(first_program, last_program + 1, PARTS_AT_ONCE):
                    for index in gl.static_range(PARTS_AT_ONCE):
                        other = first + index
                        place = 2 * other + (tile * runs_each > _share_of(other, num_runs)).to(gl.int32)
                        part = parts + place.to(gl.int64) * (TILE * ROWS) + part_places
                        is_part = (part_places >= 0) & (other <= last_program)
                        result += gl.load(part, mask=is_part, other=0.0, cache_modifier=".cg")
        if is_written:
            _write(result, out, bias, tile, num_rows, num_columns, HAS_BIAS)


@KernelLauncher
@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_product(
    out, x, weight, bias, parts, counts, num_runs, runs_each, num_rows, num_columns,
    TILE: gl.constexpr, ROWS: gl.constexpr, RUN: gl.constexpr, STAGES: gl.constexpr,
    HAS_BIAS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Programs share out the runs: ``runs_each`` of RUN columns for each TILE rows of the weight."""
    element: gl.constexpr = weight.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    num_pages: gl.constexpr = STAGES * (RUN // SWIZZLED)
    weight_pages = gl.allocate_shared_memory(element, [num_pages, TILE, SWIZZLED], swizzled)
    x_pages = gl.allocate_shared_memory(element, [num_pages, ROWS, SWIZZLED], swizzled)
    weight_tiles = weight_pages._reinterpret(element, [STAGES, TILE, RUN], swizzled)
    x_tiles = x_pages._reinterpret(element, [STAGES, ROWS, RUN], swizzled)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    if EARLY:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply_runs, (
                out, bias, parts, counts, weight_tiles, x_tiles, ready, free, num_runs, runs_each,
                num_rows, num_columns, TILE, ROWS, STAGES, HAS_BIAS,
            )),
            (_copy_runs, (
                x, weight, weight_pages, x_pages, ready, free, num_runs, runs_each, TILE, ROWS, RUN, STAGES, EARLY,
            )),
        ],
        [1],
        [REGISTERS_OF_COPIES],
    )  # fmt: skip


def hopper_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile_counts: torch.Tensor,
    shape: ProductShape,
) -> torch.Tensor:
    """``x`` [num_rows, width] @ ``weight`` [num_columns, width] transposed + ``bias``: [num_rows, num_columns].

    All contiguous, of one type of 16 bits, the width a multiple of 8. ``tile_counts`` are int32 zeros, one for every
    PRODUCT_TILE columns, and are zeros again afterwards: products that run at the same time need their own. The weight
    must not be what the kernel just before writes.
    """
    num_rows, width = x.shape
    num_columns = weight.shape[0]
    layout = swizzled_layout()
    blocks = [
        TensorDescriptor.from_tensor(tensor, [height, SWIZZLED.value], layout)
        for tensor, height in ((x, shape.num_rows), (weight, PRODUCT_TILE))
    ]
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    parts = torch.empty(2 * shape.num_programs * PRODUCT_TILE * shape.num_rows, dtype=torch.float32, device=x.device)
    runs_each = -(-width // PRODUCT_RUN)
    num_runs = -(-num_columns // PRODUCT_TILE) * runs_each
    _hopper_product(
        (shape.num_programs, 1, 1),
        (
            out,
            *blocks,
            weight if bias is None else bias,
            parts,
            tile_counts,
            num_runs,
            runs_each,
            num_rows,
            num_columns,
        ),
        (PRODUCT_TILE, shape.num_rows, PRODUCT_RUN, shape.num_stages, bias is not None),
        num_warps=4,
        registers_max=REGISTERS,
    )
    return out
