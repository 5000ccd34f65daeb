"""A process that takes all memory of a device that is left, and gives it back when it is told to."""

import subprocess
import sys

_SIZES_BYTES = (4 << 30, 256 << 20, 16 << 20, 2 << 20)
_PROGRAM = "from benchmarks.h200.memory_hog import serve_orders; serve_orders()"


class MemoryHog:
    """The front of it. Getting ready takes some seconds, for which the first order waits."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _PROGRAM]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take(self, left_bytes: int = 0) -> int:
        """Take all but so much; bytes taken."""
        return self._ask(f"take {left_bytes}")

    def give(self) -> None:
        """Give all back."""
        self._ask("give")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ask(self, order: str) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def serve_orders() -> None:
    import torch

    taken: list[torch.Tensor] = []
    torch.empty(1, device="cuda")
    for line in sys.stdin:
        order, _, argument = line.strip().partition(" ")
        if order == "give":
            taken.clear()
            torch.cuda.empty_cache()
        if order == "take":
            _take(taken, int(argument))
        print(sum(each.numel() for each in taken), flush=True)


def _take(taken: "list[object]", left_bytes: int) -> None:
    import torch

    for size in _SIZES_BYTES:
        try:
            while torch.cuda.mem_get_info()[0] - size >= left_bytes:
                taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            continue  # a smaller piece may fit
