"""Block keys: equal exactly where salt and all tokens up to the end of the block are."""

from collections.abc import Hashable

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sagellm.core.identity import RequestId
from sagellm.core.request import RequestSpec
from sagellm.prefix_reuse.block_keys import prompt_block_keys, token_block_keys

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=40)
SALT = st.sampled_from(["", "a", "b"])


def with_tokens(tokens: list[int], salt: str = "") -> RequestSpec:
    return RequestSpec(RequestId("r"), 0, len(tokens), 1, prompt_token_ids=tuple(tokens), cache_salt=salt)


def with_content(tokens: list[int], content_block_size: int, salt: str = "") -> RequestSpec:
    """Content ids that are the tokens up to their end, read as a binary number after a leading 1."""
    ends = range(content_block_size, len(tokens) + content_block_size, content_block_size)
    ids = tuple(int("1" + "".join(map(str, tokens[:end])), 2) for end in ends)
    return RequestSpec(
        RequestId("r"), 0, len(tokens), 1, content_ids=ids, content_block_size=content_block_size, cache_salt=salt
    )


def num_common(one: tuple[Hashable, ...], other: tuple[Hashable, ...]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


@given(head=TOKENS, tails=st.tuples(TOKENS, TOKENS), salts=st.tuples(SALT, SALT), block_size=st.integers(1, 8))
def test_token_keys_agree_as_far_as_tokens_do(
    head: list[int], tails: tuple[list[int], list[int]], salts: tuple[str, str], block_size: int
) -> None:
    tokens = [head + tail for tail in tails]
    keys = [prompt_block_keys(with_tokens(t, salt), block_size) for t, salt in zip(tokens, salts, strict=True)]
    assert [len(k) for k in keys] == [len(t) // block_size for t in tokens]
    expected = num_common(tuple(tokens[0]), tuple(tokens[1])) // block_size if salts[0] == salts[1] else 0
    assert num_common(*keys) == expected


@given(
    head=TOKENS,
    tails=st.tuples(TOKENS, TOKENS),
    salts=st.tuples(SALT, SALT),
    block_size=st.integers(1, 8),
    content_block_size=st.integers(1, 8),
)
def test_content_keys_agree_as_far_as_content_ids_do(
    head: list[int],
    tails: tuple[list[int], list[int]],
    salts: tuple[str, str],
    block_size: int,
    content_block_size: int,
) -> None:
    """For sizes that divide each other, either way round, and for sizes that do not."""
    requests = [with_content(head + t, content_block_size, s) for t, s in zip(tails, salts, strict=True)]
    keys = [prompt_block_keys(request, block_size) for request in requests]
    assert [len(k) for k in keys] == [request.num_prompt_tokens // block_size for request in requests]
    num_ids = num_common(requests[0].content_ids, requests[1].content_ids)
    num_tokens = min(num_ids * content_block_size, *(request.num_prompt_tokens for request in requests))
    assert num_common(*keys) == (num_tokens // block_size if salts[0] == salts[1] else 0)
    assert len(set(keys[0])) == len(keys[0]) or content_block_size % block_size != 0


def test_kinds_of_identity_never_meet() -> None:
    """Neither token ids and content ids, nor content ids of two scales, whatever their numbers."""
    tokens = prompt_block_keys(with_tokens([0] * 8), 4)
    fine = RequestSpec(RequestId("r"), 0, 8, 1, content_ids=(0, 1), content_block_size=4)
    coarse = RequestSpec(RequestId("r"), 0, 8, 1, content_ids=(0,), content_block_size=8)
    single = RequestSpec(RequestId("r"), 0, 8, 1, content_ids=(0,) * 8, content_block_size=1)
    all_keys = [tokens, *(prompt_block_keys(request, 4) for request in (fine, coarse, single))]
    assert len({keys[0] for keys in all_keys}) == 4


def test_only_tokens_that_are_there_count() -> None:
    request = RequestSpec(RequestId("r"), 0, 100, 1, content_ids=(5, 6), content_block_size=64)
    assert len(prompt_block_keys(request, 16)) == 6
    short = RequestSpec(RequestId("r"), 0, 200, 1, content_ids=(5, 6), content_block_size=64)
    assert len(prompt_block_keys(short, 16)) == 8  # content for 128 tokens is known
    assert prompt_block_keys(request, 128) == ()


def test_no_identity_no_keys() -> None:
    assert prompt_block_keys(RequestSpec(RequestId("r"), 0, 100, 1), 16) == ()


@pytest.mark.parametrize("salt", ["", "a"])
def test_a_prompt_is_keyed_like_any_sequence(salt: str) -> None:
    tokens = list(range(40))
    assert prompt_block_keys(with_tokens(tokens, salt), 16) == token_block_keys(tokens, 16, salt)
