"""What `/v1/completions` streams, as far as a measurement needs it; all else in a chunk is passed over."""

import msgspec

from sagellm.load_client.event_stream import MalformedStreamError

DONE = b"[DONE]"


class Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None  # of this chunk, where a server gives them
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        return bool(self.text) or bool(self.token_ids)


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class ErrorBody(msgspec.Struct):
    message: str | None = None


class CompletionChunk(msgspec.Struct):
    """One event, or the body of an answer that is an error."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: ErrorBody | str | None = None
    object: str | None = None
    message: str | None = None  # of an error in the older form, which has its fields at the top

    @property
    def error_message(self) -> str | None:
        """None where this is no error."""
        if isinstance(self.error, ErrorBody):
            return self.error.message or "an error without a message"
        if self.error is not None:
            return self.error
        return (self.message or "an error without a message") if self.object == "error" else None


_decoder = msgspec.json.Decoder(CompletionChunk)


def parse_chunk(data: bytes) -> CompletionChunk:
    """Raises ``MalformedStreamError`` where it is not JSON, or not of this shape."""
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise MalformedStreamError(f"an event that is no completion chunk ({error})") from error


def error_text(status: int, body: bytes) -> str:
    """What an answer other than 200 says, in a line."""
    try:
        message = parse_chunk(body).error_message
    except MalformedStreamError:
        message = None
    if message is None:
        message = body[:200].decode(errors="replace").strip()
    return f"{status}: {message}" if message else str(status)
