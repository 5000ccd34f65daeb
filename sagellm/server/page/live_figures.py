"""What the live page is told, as JSON."""

from collections.abc import Sequence

import msgspec

from sagellm import __version__
from sagellm.core.request import FinishReason
from sagellm.server.engine import Engine, InstanceSnapshot
from sagellm.server.page.live_series import SECOND_NS, Gauges, SecondFigures
from sagellm.server.prometheus.serving_metrics import ServingMetrics


class LiveInstance(msgspec.Struct, frozen=True):
    """One row of the table of instances. Counts run from its start."""

    instance_id: str
    role: str
    device: str
    is_lost: bool
    num_running: int
    num_waiting: int
    max_num_seqs: int
    num_blocks_in_use: int
    num_blocks: int
    block_size: int
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    prefix_hit_share: float | None  # of prompt tokens looked up; None: none were
    core_us_per_step: float | None


class LiveFigures(msgspec.Struct, frozen=True):
    """The page at one moment, with the seconds that it has not seen yet."""

    model: str
    version: str
    state: str  # serving, draining or down
    now_second: int
    num_unfinished: int
    num_finished: int
    num_failed: int
    num_rejected: int
    num_prompt_tokens: int
    num_output_tokens: int
    instances: Sequence[LiveInstance]
    seconds: Sequence[SecondFigures]


def live_figures(engine: Engine, metrics: ServingMetrics, since_second: int) -> LiveFigures:
    """The figures now, with the seconds after that one."""
    now_ns = engine.now_ns()
    state = "down" if not engine.is_alive else "draining" if engine.is_draining else "serving"
    finished = metrics.num_finished
    return LiveFigures(
        model=metrics.model_name,
        version=__version__,
        state=state,
        now_second=now_ns // SECOND_NS,
        num_unfinished=engine.num_unfinished,
        num_finished=finished[FinishReason.STOP] + finished[FinishReason.LENGTH],
        num_failed=finished[FinishReason.ERROR],
        num_rejected=sum(metrics.num_rejected.values()),
        num_prompt_tokens=metrics.num_prompt_tokens,
        num_output_tokens=metrics.num_output_tokens,
        instances=[_instance(each) for each in engine.snapshots()],
        seconds=metrics.series.since(now_ns, since_second),
    )


def current_gauges(engine: Engine) -> Gauges:
    """What runs, waits and fills the KV caches at this moment."""
    alive = [each for each in engine.snapshots() if not each.is_lost]
    num_blocks = sum(each.num_blocks for each in alive)
    return Gauges(
        num_running=sum(each.status.num_running for each in alive),
        num_queued=engine.num_queued + sum(each.status.num_waiting for each in alive),
        kv_usage=sum(each.status.num_blocks_in_use for each in alive) / num_blocks if num_blocks else 0.0,
    )


def _instance(snapshot: InstanceSnapshot) -> LiveInstance:
    status = snapshot.status
    queried, steps = status.num_prefix_query_tokens, status.num_steps
    return LiveInstance(
        instance_id=snapshot.instance_id,
        role=snapshot.role.value,
        device=snapshot.device,
        is_lost=snapshot.is_lost,
        num_running=status.num_running,
        num_waiting=status.num_waiting,
        max_num_seqs=snapshot.max_num_seqs,
        num_blocks_in_use=status.num_blocks_in_use,
        num_blocks=snapshot.num_blocks,
        block_size=snapshot.block_size,
        num_steps=steps,
        num_prompt_tokens=status.num_prompt_tokens,
        num_output_tokens=status.num_output_tokens,
        num_preemptions=status.num_preemptions,
        prefix_hit_share=status.num_prefix_hit_tokens / queried if queried else None,
        core_us_per_step=status.core_ns / 1e3 / steps if steps else None,
    )
