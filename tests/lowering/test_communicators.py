"""Ranks in threads and ranks of torch.distributed exchange alike."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.multiprocessing

from backends.operators.communicator import Communicator, DistributedRank, SingleRank, ThreadGroup


def part(rank: int) -> torch.Tensor:
    return torch.arange(6.0).view(2, 3) + 10 * rank


def exchange(communicator: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
    mine = part(communicator.rank)
    return communicator.all_gather(mine), communicator.all_reduce(mine.clone())


def check(communicator: Communicator, exchanged: Callable[[Communicator], tuple[torch.Tensor, torch.Tensor]]) -> None:
    parts = [part(rank) for rank in range(communicator.size)]
    gathered, reduced = exchanged(communicator)
    assert torch.equal(gathered, torch.cat(parts, dim=1))
    assert torch.equal(reduced, torch.stack(parts).sum(0))


def run_process(rank: int, size: int, meeting_file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{meeting_file}", rank=rank, world_size=size)
    try:
        check(DistributedRank(), exchange)
    finally:
        torch.distributed.destroy_process_group()


def run_process_after_this(index: int, size: int, meeting_file: str) -> None:
    run_process(index + 1, size, meeting_file)


def test_one_rank_keeps_what_it_has() -> None:
    check(SingleRank(), exchange)


def test_threads() -> None:
    group = ThreadGroup(3)
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(check, group.rank(rank), exchange) for rank in range(3)]:
            done.result()


def test_processes(tmp_path: Path) -> None:
    """This one and another."""
    meeting_file = str(tmp_path / "meeting")
    other = torch.multiprocessing.spawn(run_process_after_this, (2, meeting_file), nprocs=1, join=False)
    run_process(0, 2, meeting_file)
    while not other.join():
        pass
