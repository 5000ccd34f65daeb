"""A real model on the CPU, live: what clients get does not depend on where it ran, and the log replays.

One engine on threads, toy weights from a fixed seed; the reference is one instance with nobody beside it.
"""

import asyncio
import io
from functools import cache

import pytest
from both_drivers import Cluster, instance, read

from backends.executor_settings import ExecutorSettings
from backends.model_runner.factory import make_executor
from sagellm.core.config import ControlPlaneConfig, HandoverStart, InstanceConfig, Role
from sagellm.core.identity import InstanceId, RequestId
from sagellm.core.request import FinishReason, RequestSpec
from sagellm.core.sampling import GREEDY, SamplingParameters
from sagellm.log_replay import replay_log
from sagellm.server.live.deployment import DeployedInstance, Deployment
from sagellm.server.live.front_driver import LiveEngine
from sagellm.server.live.instance_driver import DriverOptions
from sagellm.server.live.live_log import LiveLog
from sagellm.server.live.threaded_instances import ThreadedInstances

NUM_REQUESTS = 6
NUM_OUTPUT_TOKENS = 24
VOCAB_SIZE = 260

Answers = dict[RequestId, list[int]]


def spec(index: int) -> RequestSpec:
    """Half of the requests share a beginning, half are drawn at random."""
    shared = tuple((7 * position + 3) % VOCAB_SIZE for position in range(40))
    own = tuple((31 * index + 5 * position) % VOCAB_SIZE for position in range(10 + 3 * index))
    prompt = shared + own if index % 2 else own
    sampling = GREEDY if index % 3 else SamplingParameters(temperature=0.8, top_p=0.9, seed=index)
    return RequestSpec(
        RequestId(str(index)), 0, len(prompt), NUM_OUTPUT_TOKENS, prompt_token_ids=prompt, sampling=sampling
    )


def answers(cluster: Cluster, lost: InstanceId | None = None, *, one_by_one: bool = False) -> Answers:
    """Serve all requests, with an instance that is lost on the way; check what the log replays to."""
    settings = [
        ExecutorSettings(config, "sagellm/toy", "cpu", load_format="dummy", num_threads=1)
        for config in cluster.instances
    ]
    file = io.BytesIO()

    async def serve() -> Answers:
        deployed = tuple(DeployedInstance(each, "cpu") for each in settings)
        deployment = Deployment("test", "sagellm/toy", cluster.control_plane, deployed)
        host = ThreadedInstances(settings, make_executor, DriverOptions(keeps_log=True, checks=True))
        engine = LiveEngine(deployment, host, log=LiveLog(file, cluster.header()))
        await engine.start()
        streams, reading = [], []
        for index in range(NUM_REQUESTS):
            streams.append(engine.submit(spec(index)))
            reading.append(asyncio.ensure_future(read(streams[-1])))
            if one_by_one:
                await reading[-1]
        while lost is not None and not any(
            len(stream.output_token_ids) > 5 and lost in stream.told for stream in streams
        ):
            await asyncio.sleep(0.0005)
        if lost is not None:
            host.kill(lost)
        got = await asyncio.wait_for(asyncio.gather(*reading), 30)
        assert all(outcome.reason is FinishReason.LENGTH for _, outcome in got), got
        await engine.drain(1)
        assert all(each.status.num_blocks_in_use == 0 for each in engine.snapshots() if not each.is_lost)
        return {stream.request.request_id: token_ids for stream, (token_ids, _) in zip(streams, got, strict=True)}

    got = asyncio.run(serve())
    result = replay_log(iter(file.getvalue().splitlines(keepends=True)), "log")
    assert result.difference is None
    assert result.num_polls > NUM_OUTPUT_TOKENS
    return got


def small(name: str, role: Role = Role.MIXED, num_blocks: int = 256) -> InstanceConfig:
    return instance(name, role, num_blocks, max_num_seqs=8, max_num_batched_tokens=32)


@cache
def reference() -> Answers:
    """Everybody one after the other, each prompt in one step, nothing reused."""
    alone = InstanceConfig(
        InstanceId("alone"), 256, max_num_seqs=2, max_num_batched_tokens=256, prefix_caching=False, repeat_max=1
    )
    return answers(Cluster((alone,)), one_by_one=True)


def test_the_reference_is_not_all_the_same() -> None:
    assert len({tuple(token_ids) for token_ids in reference().values()}) == NUM_REQUESTS


def test_batched_chunked_and_with_prefix_hits() -> None:
    assert answers(Cluster((small("a"),))) == reference()


def test_preempted() -> None:
    assert answers(Cluster((small("a", num_blocks=16),))) == reference()


@pytest.mark.parametrize("start", list(HandoverStart))
def test_prefilled_here_and_decoded_there(start: HandoverStart) -> None:
    cluster = Cluster((small("p", Role.PREFILL), small("d", Role.DECODE)), ControlPlaneConfig(handover_start=start))
    assert answers(cluster) == reference()


@pytest.mark.parametrize("lost", ["a", "b"])
def test_run_again_elsewhere(lost: str) -> None:
    assert answers(Cluster((small("a"), small("b"))), InstanceId(lost)) == reference()
