"""Times all-reduces of two CUDA devices of one host: NCCL, and torch's one-shot and two-shot kernels.

The one-shot kernel over peer memory is what serving engines use for small messages. NVLink multicast
is left off. Writes ``all_reduce.csv`` (algorithm, bytes, microseconds) into the folder given.

    python benchmarks/h200/measure_all_reduce.py OUT_FOLDER
"""

import csv
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.distributed._symmetric_memory as symmetric_memory
import torch.multiprocessing as multiprocessing

NUM_RANKS = 2
SIZES_BYTES = tuple(1 << shift for shift in range(13, 28))
SYMMETRIC_BYTES_MAX = 64 << 20


def median_us(call: Callable[[], object], calls: int) -> float:
    """Median microseconds of ``call``, over replays of a graph of ``calls`` calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    stream.synchronize()
    distributed.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    times_ms = []
    for _ in range(15):
        distributed.barrier()
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_ms.append(start.elapsed_time(end))
    return statistics.median(times_ms) * 1000 / calls


def measure(rank: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", rank=rank, world_size=NUM_RANKS, device_id=torch.device("cuda", rank))
    group = distributed.group.WORLD.group_name
    rows: list[tuple[str, int, float]] = []
    shared = None
    try:
        shared = symmetric_memory.empty(SYMMETRIC_BYTES_MAX // 2, dtype=torch.bfloat16, device=f"cuda:{rank}")
        symmetric_memory.rendezvous(shared, group)
        shared.normal_()
    except RuntimeError as error:
        print("no symmetric memory:", str(error)[:200])
        shared = None
    for size in SIZES_BYTES:
        plain = torch.randn(size // 2, device="cuda", dtype=torch.bfloat16) * 1e-6
        calls = 40 if size <= 1 << 20 else 8
        rows.append(("nccl", size, median_us(lambda t=plain: distributed.all_reduce(t), calls)))
        if shared is None or size > SYMMETRIC_BYTES_MAX:
            continue
        view = shared[: size // 2]
        one = median_us(lambda v=view: torch.ops.symm_mem.one_shot_all_reduce(v, "sum", group), calls)
        two = median_us(lambda v=view: torch.ops.symm_mem.two_shot_all_reduce_(v, "sum", group), calls)
        rows += [("one_shot", size, one), ("two_shot", size, two)]
    if rank == 0:
        path = Path(out)
        path.mkdir(parents=True, exist_ok=True)
        with (path / "all_reduce.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("algorithm", "bytes", "us"))
            writer.writerows((name, size, round(us, 3)) for name, size, us in rows)
        print((path / "all_reduce.csv").read_text())
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.spawn(measure, args=(sys.argv[1],), nprocs=NUM_RANKS)
