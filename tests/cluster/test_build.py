"""From descriptions to configurations and prices."""

from dataclasses import replace

import pytest

from sagellm.cluster.build import BuiltCluster, build_cluster
from sagellm.cluster.reading import parse_cluster, read_cluster
from sagellm.core.identity import InstanceId
from sagellm.cost_model.step_cost import StepFeatures
from sim.cluster_file import load_cluster


def build(text: str, *, fast_forward: bool = True) -> BuiltCluster:
    return build_cluster(parse_cluster(text, source="mine.yaml", name="mine"), fast_forward=fast_forward)


def test_h200x1_vllm_is_built_as_measured() -> None:
    built = build_cluster(read_cluster("h200x1-vllm"))
    (instance,) = built.instances
    assert instance.config.num_blocks * instance.config.block_size == 2_056_176
    assert instance.config.steps_in_flight_max == 2
    assert not instance.config.prefix_caching
    # Nothing is held back before the engine's own queue, however long the prompts.
    assert built.control_plane.dispatch_tokens_max > 10**15
    assert built.profile_status == "measured"


def test_kv_fills_the_memory_that_is_left() -> None:
    text = "model: Qwen/Qwen2.5-7B\ninstances: [{device: h200, memory_utilization: %s}]\n"
    half, most = (build(text % share).instances[0].config for share in (0.5, 0.9))
    assert half.num_blocks < most.num_blocks
    # Two tensors (K and V) x 28 layers x 4 KV heads x 128 x 2 bytes.
    assert half.kv_bytes_per_token == 2 * 28 * 4 * 128 * 2
    assert most.num_token_slots * most.kv_bytes_per_token < 141e9 * 0.9


@pytest.mark.parametrize(("profile", "makes_room"), [("h200/spec", True), ("h200/vllm-0.22.1-qwen2.5-7b", False)])
def test_smaller_steps_leave_more_room_where_nobody_has_measured_it(profile: str, makes_room: bool) -> None:
    text = "model: Qwen/Qwen2.5-7B\ninstances: [{profile: %s, max_num_batched_tokens: %d}]\n"
    small, large = (build(text % (profile, num_tokens)).instances[0].config.num_blocks for num_tokens in (512, 32768))
    assert (small > large) == makes_room
    assert (small == large) != makes_room


def test_ranks_that_outnumber_kv_heads_hold_copies() -> None:
    one, eight = (
        build(f"model: Qwen/Qwen2.5-32B\ninstances: [{{device: h200, tp: {tp}}}]\n").instances[0].config
        for tp in (1, 8)
    )
    assert one.kv_bytes_per_token == eight.kv_bytes_per_token  # 8 KV heads
    seven_b = build("model: Qwen/Qwen3-8B\ninstances: [{device: h200, tp: 16}]\n").instances[0].config
    assert seven_b.kv_bytes_per_token == 2 * one_of("Qwen/Qwen3-8B").kv_bytes_per_token


def one_of(model: str) -> object:
    return build(f"model: {model}\ninstances: [{{device: h200}}]\n").instances[0].config


def test_tensor_parallel_instances_are_quicker() -> None:
    text = "model: Qwen/Qwen2.5-32B\ninstances: [{device: h200, profile: vllm-0.22.1, tp: %d}]\n"
    features = StepFeatures(num_decode_seqs=8, num_decode_context_tokens=8_000)
    alone, together = (build(text % tp).instances[0].cost_model.step_cost(features) for tp in (1, 2))
    assert together.device_fs < alone.device_fs < 2 * together.device_fs


def test_without_fast_forward_no_step_repeats() -> None:
    text = "model: Qwen/Qwen2.5-7B\ninstances: [{device: h200}]\n"
    assert build(text, fast_forward=False).instances[0].config.repeat_max == 1
    assert build(text).instances[0].config.repeat_max > 1_000


def test_steps_that_are_planned_late_are_repeated_too() -> None:
    text = "model: Qwen/Qwen2.5-7B\ninstances: [{device: h200, plan_lead: 2ms}]\n"
    (late,) = build(text).instances
    assert late.config.plan_lead_ns == 2_000_000
    assert late.config.repeat_max > 1
    assert build(text, fast_forward=False).instances[0].config == replace(late.config, repeat_max=1)
    (at_once,) = build("model: Qwen/Qwen2.5-7B\ninstances: [{device: h200, plan_lead: none}]\n").instances
    assert at_once.config.plan_lead_ns == 0
    assert at_once.config.repeat_max > 1


def test_the_status_is_that_of_the_weakest_number() -> None:
    groups = "instances:\n  - {profile: h200/vllm-0.22.1%s}\n  - {profile: h200/vllm-0.22.1%s}\n"
    links = "links: {bandwidth: 400Gb/s, latency: 5us}\n"
    mixed = build("model: Qwen/Qwen2.5-7B\n" + groups % ("", "") + links)
    split = build("model: Qwen/Qwen2.5-7B\n" + groups % (", role: prefill", ", role: decode") + links)
    assert mixed.profile_status == "measured"
    assert split.profile_status == "estimate"  # a link of one's own was not measured by anybody
    assert split.link.transfer_ns(50 * 10**9) == pytest.approx(10**9 + 5_000)


def test_the_model_s_own_context_length_is_the_limit() -> None:
    text = "model: facebook/opt-13b\ninstances: [{device: h200}]\n"
    assert build(text).control_plane.max_model_len == 2048
    assert build(text + "limits: {max_model_len: 512}\n").control_plane.max_model_len == 512


def test_a_cluster_to_simulate_has_the_same_instances() -> None:
    simulated = load_cluster("h200x4-pd")
    built = build_cluster(read_cluster("h200x4-pd"))
    assert [each.config for each in simulated.instances] == [each.config for each in built.instances]
    assert simulated.instances[0].config.instance_id == InstanceId("prefill-0")
