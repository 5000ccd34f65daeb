"""Prompts share what the trace says that they share, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from sagellm.load_client.prompts import FIRST_TOKEN_ID, NUM_TOKEN_IDS, prompt_token_ids
from traces.request_trace import TraceRequest

BLOCK = 16


@st.composite
def requests_with_content(draw: st.DrawFn) -> TraceRequest:
    """Its content ids name whole blocks and what is left over, as a trace's do; few ids, so that some are shared."""
    num_tokens = draw(st.integers(1, 6 * BLOCK))
    num_blocks = -(-num_tokens // BLOCK)
    # A chained id: equal only where all before it are equal.
    chosen = draw(st.lists(st.integers(0, 2), min_size=num_blocks, max_size=num_blocks))
    ids = []
    for choice in chosen:
        ids.append((ids[-1] if ids else 0) * 3 + choice + 1)
    return TraceRequest(0, num_tokens, 1, content_ids=tuple(ids))


def shared_prefix(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(one=requests_with_content(), other=requests_with_content())
def test_prompts_share_whole_blocks_exactly_where_content_ids_are_equal(one: TraceRequest, other: TraceRequest) -> None:
    first, second = prompt_token_ids(1, one, BLOCK, "n"), prompt_token_ids(2, other, BLOCK, "n")
    assert (len(first), len(second)) == (one.num_prompt_tokens, other.num_prompt_tokens)
    equal_ids = shared_prefix(list(one.content_ids), list(other.content_ids))
    expected = min(equal_ids * BLOCK, len(first), len(second))
    shared = shared_prefix(first, second)
    assert shared >= expected
    # Beyond that they are drawn apart: they may agree by chance, but not for long.
    assert shared - expected < BLOCK // 2 or shared == min(len(first), len(second))


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 5))
def test_prompts_without_content_and_other_runs_share_nothing(num_tokens: int, index: int, other: int) -> None:
    request = TraceRequest(0, num_tokens + 8, 1)
    prompt = prompt_token_ids(index, request, 0, "n")
    assert all(FIRST_TOKEN_ID <= token < FIRST_TOKEN_ID + NUM_TOKEN_IDS for token in prompt)
    assert (prompt == prompt_token_ids(other, request, 0, "n")) == (index == other)
    assert prompt[:8] != prompt_token_ids(index, request, 0, "m")[:8]


def test_every_id_is_drawn_about_equally_often() -> None:
    prompt = prompt_token_ids(0, TraceRequest(0, 95_000, 1), 0, "n")
    counts = [prompt.count(token) for token in range(FIRST_TOKEN_ID, FIRST_TOKEN_ID + NUM_TOKEN_IDS)]
    # 256 byte values fall on 95 ids: some ids have three of them, others two.
    assert min(counts) > 600
    assert max(counts) < 1300
