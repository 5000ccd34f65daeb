"""``POST /tokenize`` and ``POST /detokenize``: the model's tokeniser for clients that have none."""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from sagellm.server.openai.body_reading import read_body
from sagellm.server.openai.conversations import chat_prompt
from sagellm.server.openai.errors import invalid
from sagellm.server.openai.options import check, check_model
from sagellm.server.openai.request_bodies import DetokenizeBody, TokenizeBody
from sagellm.server.openai.serving import SERVING


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: Sequence[str] | None


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str


async def tokenize(request: web.Request) -> web.Response:
    """Token ids of a prompt, or of the prompt that a conversation becomes."""
    serving = request.app[SERVING]
    body = read_body(await request.read(), TokenizeBody, serving.unknown_fields)
    check_model(body.model, serving.settings)
    if body.prompt is not None:
        token_ids = await serving.encode(body.prompt, body.add_special_tokens is not False)
    elif body.messages is not None:
        text = chat_prompt(body, serving.tokenizer.chat_template, serving.settings.trust_request_chat_template)
        token_ids = await serving.encode(text, body.add_special_tokens is True)
    else:
        raise invalid("prompt", "prompt: missing, must be a text; or send messages")
    names = [serving.tokenizer.token_name(token_id) for token_id in token_ids] if body.return_token_strs else None
    return _json(Tokenized(len(token_ids), serving.settings.max_model_len, token_ids, names))


async def detokenize(request: web.Request) -> web.Response:
    """Text of token ids, special tokens included."""
    serving = request.app[SERVING]
    body = read_body(await request.read(), DetokenizeBody, serving.unknown_fields)
    check_model(body.model, serving.settings)
    tokens = body.tokens
    if tokens is None:
        raise invalid("tokens", "tokens: missing, must be a list of token ids")
    for worst in (min(tokens, default=0), max(tokens, default=0)):
        vocab_size = serving.settings.vocab_size
        check(0 <= worst < vocab_size, "tokens", worst, f"token ids of 0 to {vocab_size - 1}")
    return _json(Detokenized(serving.tokenizer.decode(tokens, skip_special_tokens=False)))


def _json(body: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
