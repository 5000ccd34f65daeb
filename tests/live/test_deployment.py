"""From cluster files to processes: the same limits as in simulation, and a device for everybody."""

from dataclasses import replace

import pytest

from sagellm.cluster.backends import backend_of_profile
from sagellm.cluster.build import build_cluster
from sagellm.cluster.named_files import list_clusters
from sagellm.cluster.reading import parse_cluster, read_cluster
from sagellm.server.live.deployment import DeploymentError, ModelChoice, deploy

CPU_FILE = """\
model: sagellm/toy
instances:
  - {device: cpu, count: 2, max_num_seqs: 8, kv_tokens: 4096}
  - {device: cpu, role: prefill, kv_tokens: 2048}
limits: {queue_max: 7, max_model_len: 300, dispatch_tokens_max: 99, attempts_max: 5}
routing: {strategy: priority, routing: round_robin, handover: streamed}
"""


@pytest.mark.parametrize("name", list_clusters())
def test_what_is_deployed_is_what_is_simulated(name: str) -> None:
    cluster = read_cluster(name)
    simulated = build_cluster(cluster, fast_forward=False)
    deployed = deploy(cluster)
    assert deployed.control_plane == simulated.control_plane
    for live, simulated_instance in zip(deployed.instances, simulated.instances, strict=True):
        config = simulated_instance.config
        # Where no profile says when steps are planned, they are planned at once in simulation: to be repeated.
        lead_ns = config.plan_lead_ns or live.settings.instance.plan_lead_ns
        assert live.settings.instance == replace(config, plan_lead_ns=lead_ns)
    assert all(each.settings.instance.repeat_max == 1 for each in deployed.instances)


def test_a_cluster_of_cpus() -> None:
    cluster = parse_cluster(CPU_FILE, source="cpu.yaml", name="cpu")
    deployed = deploy(cluster, ModelChoice("dummy", "float32", 3), num_threads=2)
    assert [each.instance_id for each in deployed.instances] == ["mixed-0", "mixed-1", "prefill-0"]
    for each in deployed.instances:
        settings = each.settings
        assert (settings.backend, each.device, settings.model) == ("cpu", "cpu", "sagellm/toy")
        assert (settings.load_format, settings.dtype, settings.seed, settings.num_threads) == ("dummy", "float32", 3, 2)
        assert settings.max_model_len == 300
    assert deployed.control_plane.queue_max == 7
    assert deployed.control_plane.attempts_max == 5
    assert [each.settings.instance.num_blocks for each in deployed.instances] == [256, 256, 128]


@pytest.mark.parametrize(("plan_lead", "plan_lead_ns"), [("none", 0), ("3ms", 3_000_000)])
def test_when_steps_are_planned_is_as_the_file_says(plan_lead: str, plan_lead_ns: int) -> None:
    text = f"model: Qwen/Qwen2.5-7B\ninstances: [{{device: h200, plan_lead: {plan_lead}}}]\n"
    cluster = parse_cluster(text, source="late.yaml", name="late")
    (deployed,) = deploy(cluster).instances
    (simulated,) = build_cluster(cluster, fast_forward=False).instances
    assert deployed.settings.instance == simulated.config
    assert deployed.settings.instance.plan_lead_ns == plan_lead_ns


def test_every_instance_has_a_device_of_its_own() -> None:
    cluster = read_cluster("h200x4-pd")
    deployed = deploy(cluster, num_devices={"cuda": 4})
    assert [each.device for each in deployed.instances] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [each.settings.device_indexes for each in deployed.instances] == [(0,), (1,), (2,), (3,)]
    with pytest.raises(DeploymentError, match=r"decode-0: no cuda device is left for it; there are 2"):
        deploy(cluster, num_devices={"cuda": 2})


def test_tensor_parallel_instances_are_refused() -> None:
    text = "model: Qwen/Qwen2.5-7B\ninstances: [{device: h200, tp: 2}]\n"
    cluster = parse_cluster(text, source="tp.yaml", name="tp")
    with pytest.raises(DeploymentError, match="mixed-0: tp is 2, but an instance on live devices has one device"):
        deploy(cluster, num_devices={"cuda": 8})


def test_numbers_of_four_bytes_leave_room_for_fewer_tokens() -> None:
    cluster = read_cluster("h200x1")
    halves = deploy(cluster, ModelChoice(dtype="bfloat16")).instances[0].settings.instance
    wholes = deploy(cluster, ModelChoice(dtype="float32")).instances[0].settings.instance
    assert wholes.kv_bytes_per_token == 2 * halves.kv_bytes_per_token
    assert wholes.num_blocks * 2 < halves.num_blocks


@pytest.mark.parametrize(
    ("profile", "backend"),
    [
        ("cpu/spec", "cpu"),
        ("h200/spec", "cuda"),
        ("h200/vllm-0.22.1-qwen2.5-7b", "cuda"),
        ("ascend-910c/spec", "ascend"),
    ],
)
def test_a_profile_says_what_it_runs_on(profile: str, backend: str) -> None:
    assert backend_of_profile(profile) == backend


@pytest.mark.parametrize("profile", ["h300/spec", "mine.json"])
def test_a_profile_that_does_not_say_is_refused(profile: str) -> None:
    with pytest.raises(ValueError, match=r"profile: .*cpu/spec or h200/spec"):
        backend_of_profile(profile)
