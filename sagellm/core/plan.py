"""One step: which requests get how many tokens.

A step has no phases. It is ``{request: number of tokens}``, written in a form that stays small when
hundreds of requests each get one token.
"""

import msgspec

from sagellm.core.identity import BlockId, RequestId


class TokenChunk(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Some consecutive tokens of one request, other than a lone decode token."""

    request_id: RequestId
    num_tokens: int
    num_computed_tokens: int  # tokens of the request whose KV is there before this step
    samples: bool  # true where the chunk reaches the request's last known token, so a new one comes out


class StepPlan(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One forward pass, in integers only.

    ``decode_request_ids`` get one token each and sample one each. ``new_block_ids`` extends block
    tables: blocks that a request got since the last plan, in table order. ``preempted_request_ids``
    lost all blocks since the last plan, preempted or begun again after a failed step: their tables are
    empty before ``new_block_ids`` are added. A ``KVReserved`` begins a new table, too.
    """

    decode_request_ids: tuple[RequestId, ...]
    num_decode_context_tokens: int  # KV tokens that the decodes read, summed, before this step
    chunks: tuple[TokenChunk, ...]
    new_block_ids: tuple[tuple[RequestId, tuple[BlockId, ...]], ...]
    preempted_request_ids: tuple[RequestId, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step; the token budget bounds it."""
        return len(self.decode_request_ids) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_seqs(self) -> int:
        return len(self.decode_request_ids) + len(self.chunks)

    @property
    def sampled_request_ids(self) -> tuple[RequestId, ...]:
        """Requests that get a new token from this step, in the order of its outputs."""
        if not self.chunks:
            return self.decode_request_ids
        return self.decode_request_ids + tuple(c.request_id for c in self.chunks if c.samples)

    def num_tokens_by_request(self) -> dict[RequestId, int]:
        """The plan in the design's words: request -> number of tokens."""
        counts = dict.fromkeys(self.decode_request_ids, 1)
        counts.update((chunk.request_id, chunk.num_tokens) for chunk in self.chunks)
        return counts
