"""Prompts of token ids: as long as recorded, and equal where the trace says that they are.

Ids are those of 95 tokens that every vocabulary has (in one of bytes, the printable ASCII characters).
"""

from hashlib import shake_128

from traces.request_trace import TraceRequest

FIRST_TOKEN_ID = 32
NUM_TOKEN_IDS = 95
_TOKEN_OF_BYTE = bytes(FIRST_TOKEN_ID + byte % NUM_TOKEN_IDS for byte in range(256))


def prompt_token_ids(index: int, request: TraceRequest, content_block_size: int, nonce: str) -> list[int]:
    """The prompt of the trace's request number ``index``.

    Equal content ids give equal tokens; a prompt without content shares a prefix with no other. Two runs
    with different nonces share nothing, so that the second finds no cache warm that the trace knows not of.
    """
    num_tokens = request.num_prompt_tokens
    if not request.content_ids or content_block_size < 1:
        return list(_tokens(f"{nonce}/request/{index}", num_tokens))
    blocks = [_tokens(f"{nonce}/content/{content_id}", content_block_size) for content_id in request.content_ids]
    tokens = b"".join(blocks)[:num_tokens]
    # What no content id stands for is the request's own.
    return list(tokens + _tokens(f"{nonce}/request/{index}", num_tokens - len(tokens)))


def _tokens(name: str, num_tokens: int) -> bytes:
    """That many token ids, a byte each, drawn by a hash of the name."""
    return shake_128(name.encode()).digest(num_tokens).translate(_TOKEN_OF_BYTE)
