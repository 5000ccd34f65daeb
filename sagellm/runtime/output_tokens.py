"""What to keep of the tokens that a step gave."""

from collections.abc import Mapping

from sagellm.core.identity import RequestId
from sagellm.runtime.local_request import LocalRequest

TokenIds = tuple[tuple[int, ...], ...] | None
"""For each request its tokens, one for each repetition of the step; None where tokens are symbolic."""


def without(
    request_ids: tuple[RequestId, ...], token_ids: TokenIds, muted: dict[RequestId, None]
) -> tuple[tuple[RequestId, ...], TokenIds]:
    """The requests, and their tokens, less the muted ones."""
    kept = [index for index, request_id in enumerate(request_ids) if request_id not in muted]
    return (
        tuple(request_ids[index] for index in kept),
        None if token_ids is None else tuple(token_ids[index] for index in kept),
    )


def num_until_stop(token_ids: tuple[int, ...], stop_token_ids: tuple[int, ...]) -> int:
    """How many tokens there are up to the first stop token, with it; all where there is none."""
    for index, token_id in enumerate(token_ids):
        if token_id in stop_token_ids:
            return index + 1
    return len(token_ids)


def take_tokens(
    requests: Mapping[RequestId, LocalRequest],
    request_ids: tuple[RequestId, ...],
    token_ids: tuple[tuple[int, ...], ...],
) -> tuple[tuple[tuple[int, ...], ...], list[LocalRequest]]:
    """Add each request's tokens to it, cut at its first stop token; also give the requests that stopped."""
    kept: list[tuple[int, ...]] = []
    stopped: list[LocalRequest] = []
    for request_id, ids in zip(request_ids, token_ids, strict=True):
        request = requests[request_id]
        stops = request.spec.stop_token_ids
        if stops:
            num_kept = num_until_stop(ids, stops)
            if num_kept < len(ids) or ids[-1] in stops:
                ids = ids[:num_kept]
                stopped.append(request)
        if request.output_token_ids is None:
            request.output_token_ids = []
        request.output_token_ids.extend(ids)
        kept.append(ids)
    return tuple(kept), stopped
