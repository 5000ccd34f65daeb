"""What a cluster file may say, and what it is told where it says something else."""

from pathlib import Path

import pytest

from sagellm.cluster.description import UNLIMITED, CustomLink
from sagellm.cluster.errors import ClusterFileError
from sagellm.cluster.named_files import list_clusters, named_cluster_text
from sagellm.cluster.reading import parse_cluster, read_cluster
from sagellm.core.config import HandoverStart, Role

MINIMAL = """\
model: Qwen/Qwen2.5-7B
instances:
  - device: h200
"""


def parse(text: str) -> object:
    return parse_cluster(text, source="mine.yaml", name="mine")


def error_of(text: str) -> str:
    with pytest.raises(ClusterFileError) as caught:
        parse(text)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", list_clusters())
def test_named_clusters_are_good_files(name: str) -> None:
    assert read_cluster(name).name == name


def test_the_clusters_of_the_issue_are_there() -> None:
    assert {"h200x1", "h200x1-vllm", "h200x4-colocated", "h200x4-pd"} <= set(list_clusters())


def test_h200x1_vllm_is_as_measured() -> None:
    (group,) = read_cluster("h200x1-vllm").instances
    assert (group.max_num_seqs, group.max_num_batched_tokens, group.prefix_caching) == (256, 8192, False)
    assert group.kv_tokens == 2_056_176


def test_h200x4_pd_has_two_of_each() -> None:
    named = read_cluster("h200x4-pd").named_instances()
    assert [name for name, _ in named] == ["prefill-0", "prefill-1", "decode-0", "decode-1"]


def test_what_is_printed_can_be_read_back(tmp_path: Path) -> None:
    for name in list_clusters():
        path = tmp_path / f"{name}.yaml"
        path.write_text(named_cluster_text(name))
        assert read_cluster(str(path)) == read_cluster(name)


def test_a_whole_file() -> None:
    cluster = parse(
        """
name: whole
model: meta-llama/Llama-3.1-8B
instances:
  - {name: p, count: 2, role: prefill, device: H200, tp: 2, max_num_seqs: 8, block_size: 32, kv_tokens: 4096}
  - {name: d, role: decode, profile: h200/spec, prefix_caching: false, steps_in_flight: 1, memory_utilization: 0.8}
links: {bandwidth: 400Gb/s, latency: 10us}
limits: {queue_max: 10, dispatch_tokens_max: unlimited, max_model_len: 4096, attempts_max: 1}
routing: {strategy: slo_aware, routing: prefix_affinity, disaggregate_min_tokens: 64, handover: streamed}
slo: {ttft: 2s}
"""
    )
    assert [name for name, _ in cluster.named_instances()] == ["p-0", "p-1", "d"]
    assert [group.role for group in cluster.instances] == [Role.PREFILL, Role.DECODE]
    assert {group.profile for group in cluster.instances} == {"h200/spec"}
    assert cluster.link == CustomLink(bandwidth_bytes_per_s=50 * 10**9, latency_ns=10_000)
    assert cluster.limits.dispatch_tokens_max == UNLIMITED
    assert cluster.routing.handover is HandoverStart.STREAMED
    assert (cluster.slo.ttft_ns, cluster.slo.tpot_ns) == (2 * 10**9, None)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (MINIMAL + "modle: x\n", 4, ["modle", "unknown key", "'model'"]),
        (MINIMAL + "    rolle: mixed\n", 4, ["instances[0].rolle", "unknown key", "'role'"]),
        (MINIMAL + "    role: decoder\n", 4, ["instances[0].role", "'decoder'", "'decode'"]),
        (MINIMAL + "    count: 0\n", 4, ["instances[0].count", "0", "greater than or equal to 1"]),
        (MINIMAL + "    count: two\n", 4, ["instances[0].count", "'two'", "integer"]),
        (MINIMAL + "    count: 1.5\n", 4, ["instances[0].count", "1.5", "integer"]),
        (MINIMAL + "    tp: true\n", 4, ["instances[0].tp", "True", "integer"]),
        (MINIMAL + "    prefix_caching: 1\n", 4, ["prefix_caching", "boolean"]),
        (MINIMAL + "    name: a b\n", 4, ["instances[0].name", "'a b'", "letters"]),
        (MINIMAL + "    memory_utilization: 1.5\n", 4, ["memory_utilization", "1.5"]),
        (MINIMAL + "    plan_lead: 2\n", 4, ["plan_lead", "2", "unit"]),
        (MINIMAL + "    steps_in_flight: 1\n    plan_lead: 2ms\n", 3, ["plan_lead", "steps_in_flight: 1"]),
        (MINIMAL + "    steps_in_flight: 3\n", 4, ["steps_in_flight", "3", "less than or equal to 2"]),
        (MINIMAL + "    max_num_batched_tokens: 16\n", 4, ["max_num_batched_tokens", "16", "max_num_seqs (256)"]),
        (MINIMAL + "    profile: h200/vlm\n", 4, ["instances[0].profile", "'h200/vlm'", "'h200/"]),
        (MINIMAL + "    profile: h100/spec\n", 4, ["'h100/spec'", "'h200'"]),
        (MINIMAL + "    eviction: lry\n", 4, ["eviction", "'lry'", "'lru'"]),
        (MINIMAL + "    kv_tokens: 8\n", 4, ["kv_tokens", "one block"]),
        (MINIMAL + "    kv_tokens: 900000000\n", 4, ["kv_tokens", "900000000", "do not fit"]),
        (MINIMAL + "    role: decode\n", 4, ["no prefill instance"]),
        (MINIMAL + "    role: prefill\n", 4, ["role: decode"]),
        (MINIMAL + "    device: h100\n", 4, ["device", "twice"]),
        (MINIMAL + "routing: {strategy: fifoo}\n", 4, ["routing.strategy", "'fifoo'", "'fifo'"]),
        (MINIMAL + "routing:\n  routing: random\n", 5, ["routing.routing", "'random'", "round_robin"]),
        (MINIMAL + "routing: {handover: later}\n", 4, ["routing.handover", "'later'", "at_end"]),
        (MINIMAL + "links: {between_instances: nvlnk4}\n", 4, ["between_instances", "'nvlnk4'", "'nvlink4'"]),
        (MINIMAL + "links: {bandwidth: 400Gb/s}\n", 4, ["links", "latency"]),
        (MINIMAL + "links: {bandwidth: 400Gbps, latency: 1us}\n", 4, ["links.bandwidth", "'400Gbps'", "400Gb/s"]),
        (MINIMAL + "slo: {ttft: 500}\n", 4, ["slo.ttft", "500", "500ms"]),
        (MINIMAL + "slo: {ttft: -5ms}\n", 4, ["slo.ttft", "'-5ms'", "500ms"]),
        (MINIMAL + "slo: fast\n", 4, ["slo", "'fast'", "mapping"]),
        (MINIMAL + "limits: {queue_max: none}\n", 4, ["limits.queue_max", "'none'", "integer"]),
        ("model: Qwen/Qwen2.5-7\ninstances: [{device: h200}]\n", 1, ["model", "'Qwen/Qwen2.5-7'", "Qwen2.5-7B'"]),
        ("model: Qwen/Qwen2.5-7B\n", 1, ["instances", "missing"]),
        ("instances: [{device: h200}]\n", 1, ["model", "missing"]),
        ("model: Qwen/Qwen2.5-7B\ninstances: []\n", 2, ["instances", "at least 1"]),
        ("model: Qwen/Qwen2.5-7B\ninstances: [{count: 1}]\n", 2, ["instances[0]", "device: h200"]),
        ("model: Qwen/Qwen2.5-7B\ninstances: [{device: h201}]\n", 2, ["'h201/spec'", "'h20"]),
        ("model: Qwen/Qwen2.5-72B\ninstances: [{device: h200}]\n", 2, ["Qwen2.5-72B", "GiB", "tp"]),
        ("model: Qwen/Qwen2.5-7B\ninstances: [{device: h200, tp: 3}]\n", 2, ["tp is 3", "28"]),
        ("model: a\n  b: c: d\n", 2, ["not YAML"]),
        ("model: [\n", 2, ["not YAML"]),
        ("model: !!python/object:os.system x\n", 1, ["not YAML"]),
        ("- a\n- b\n", None, ["not a mapping"]),
        ("", None, ["empty"]),
        ("# nothing\n", None, ["empty"]),
        ("a: 1\n---\nb: 2\n", 2, ["not YAML"]),
    ],
)
def test_bad_files_get_one_sentence(text: str, line: int | None, words: list[str]) -> None:
    message = error_of(text)
    assert message.startswith("mine.yaml:" if line is None else f"mine.yaml:{line}:")
    for word in words:
        assert word in message, message


def test_two_instances_of_one_name() -> None:
    message = error_of(MINIMAL + "    name: a\n  - {device: h200, name: b}\n  - {device: h200, name: a}\n")
    assert message.startswith("mine.yaml:6: instances[2].name: two instances are called 'a'")
    assert "a-1" in error_of(
        MINIMAL
        + "    {count: 2, name: a}\n".replace("    {", "  - {device: h200, ")
        + "  - {device: h200, name: a-1}\n"
    )


def test_groups_without_names_number_on() -> None:
    cluster = parse(MINIMAL + "  - {device: h200, count: 2}\n")
    assert [name for name, _ in cluster.named_instances()] == ["mixed-0", "mixed-1", "mixed-2"]


def test_prefill_may_hand_over_to_mixed_instances() -> None:
    assert parse(MINIMAL + "  - {device: h200, role: prefill}\n")


def test_a_missing_file_and_a_misspelt_name(tmp_path: Path) -> None:
    with pytest.raises(ClusterFileError, match="did you mean 'h200x4-pd'"):
        read_cluster("h200x4_pd")
    with pytest.raises(ClusterFileError, match="neither a file nor a named cluster"):
        read_cluster(str(tmp_path / "nothing.yaml"))
    with pytest.raises(ClusterFileError, match="cannot read"):
        read_cluster(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterFileError, match="UTF-8"):
        read_cluster(str(tmp_path / "binary.yaml"))


def test_a_config_file_of_ones_own_is_found_beside_the_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,'
        ' "intermediate_size": 128, "vocab_size": 100}'
    )
    path = tmp_path / "mine.yaml"
    path.write_text("model: config.json\ninstances: [{device: h200}]\n")
    assert read_cluster(str(path)).model == str(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ClusterFileError, match="num_hidden_layers"):
        read_cluster(str(path))
