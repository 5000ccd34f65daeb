"""Chance is a parameter: whoever makes a machine hands it a seeded source."""

from typing import Protocol


class Rng(Protocol):
    """What a policy may ask of chance. A seeded ``random.Random`` is one."""

    def randrange(self, stop: int, /) -> int: ...
