"""What a block of a prompt holds, as keys that are equal where the content is equal.

A key names a block's content *given all blocks before it*: keys are compared only along a path from
the start of a prompt. The first key of a prompt also carries what must never be mixed: the salt, and
the scale of the content ids.
"""

from collections.abc import Hashable, Sequence

from sagellm.core.request import RequestSpec

BlockKeys = tuple[Hashable, ...]


def prompt_block_keys(request: RequestSpec, block_size: int) -> BlockKeys:
    """One key for each full block of the prompt, in order; empty where the prompt has no identity."""
    if request.prompt_token_ids is not None:
        return token_block_keys(request.prompt_token_ids, block_size, request.cache_salt)
    if request.content_ids:
        return _content_block_keys(request, block_size)
    return ()


def token_block_keys(token_ids: Sequence[int], block_size: int, cache_salt: str) -> BlockKeys:
    """One key for each full block of a sequence that starts with ``token_ids[0]``."""
    keys = token_run_keys(token_ids, block_size)
    return _with_namespace(keys, cache_salt, 0)


def token_run_keys(token_ids: Sequence[int], block_size: int) -> list[Hashable]:
    """One key for each full block of tokens that follow others."""
    num_full_tokens = len(token_ids) // block_size * block_size
    return [tuple(token_ids[start : start + block_size]) for start in range(0, num_full_tokens, block_size)]


def _content_block_keys(request: RequestSpec, block_size: int) -> BlockKeys:
    content_ids, content_block_size = request.content_ids, request.content_block_size
    num_known_tokens = min(request.num_prompt_tokens, len(content_ids) * content_block_size)
    num_keys = num_known_tokens // block_size
    keys: list[Hashable] = []
    if content_block_size == block_size:
        keys += content_ids[:num_keys]
    elif content_block_size % block_size == 0:
        ratio = content_block_size // block_size
        for content_id in content_ids:
            keys += range(content_id * ratio, content_id * ratio + ratio)
        del keys[num_keys:]
    else:
        for start in range(0, num_keys * block_size, block_size):
            first = start // content_block_size
            end = (start + block_size - 1) // content_block_size + 1
            # The offset tells apart blocks that lie inside one and the same content id.
            keys.append((start % content_block_size, *content_ids[first:end]))
    return _with_namespace(keys, request.cache_salt, content_block_size)


def _with_namespace(keys: list[Hashable], cache_salt: str, content_block_size: int) -> BlockKeys:
    """Keys whose first one differs from that of any other salt or kind of identity (0: token ids)."""
    if keys:
        keys[0] = (cache_salt, content_block_size, keys[0])
    return tuple(keys)
