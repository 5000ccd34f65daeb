"""Prefix hits on the published Mooncake conversation trace, in blocks of 512 tokens."""

import json
from pathlib import Path

import pytest

from sagellm.kv_runtime.hit_ratio import count_hit_blocks, count_optimal_hit_blocks

TRACE = Path(__file__).resolve().parents[2].parent / "shared/data/traces/mooncake_conversation.jsonl"


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    """The block keys of each request; the last, partly filled block of a prompt counts as a block."""
    if not TRACE.exists():
        pytest.skip(f"the Mooncake trace is not at {TRACE}")
    with TRACE.open() as lines:
        return [tuple(json.loads(line)["hash_ids"]) for line in lines]


@pytest.mark.parametrize(
    ("num_blocks", "hit_ratio"),
    [(1_000, 0.045), (3_000, 0.065), (10_000, 0.211), (30_000, 0.326), (50_000, 0.355), (100_000, 0.364)],
)
def test_lru_hit_ratio(prompts: list[tuple[int, ...]], num_blocks: int, hit_ratio: float) -> None:
    assert count_hit_blocks(prompts, num_blocks) / sum(map(len, prompts)) == pytest.approx(hit_ratio, abs=0.004)


def test_unbounded_hit_ratio(prompts: list[tuple[int, ...]]) -> None:
    num_asked = sum(map(len, prompts))
    num_hits = count_hit_blocks(prompts, num_asked)
    assert num_hits / num_asked == pytest.approx(0.366, abs=0.002)
    assert num_hits == num_asked - len({key for prompt in prompts for key in prompt})
    assert num_hits == count_optimal_hit_blocks(prompts, num_asked)


@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo"])
def test_no_policy_beats_the_optimum_on_the_trace(prompts: list[tuple[int, ...]], eviction: str) -> None:
    some = prompts[:3000]
    assert count_hit_blocks(some, 3_000, eviction) <= count_optimal_hit_blocks(some, 3_000)
