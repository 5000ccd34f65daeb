"""Scheduling on one instance, and the scheduler that a caller drives batch by batch.

`PDScheduler` is a driver of the machines, which themselves import from this package; so its names are
loaded when they are first asked for.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sagellm.runtime.scheduler.pd_config import PDMode, PDSchedulerConfig
    from sagellm.runtime.scheduler.pd_scheduler import PDScheduler

__all__ = ["PDMode", "PDScheduler", "PDSchedulerConfig"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sagellm.runtime.scheduler import pd_scheduler

    return getattr(pd_scheduler, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
