"""What every handler needs, in one place."""

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from aiohttp import web

from sagellm.server.app_settings import AppSettings
from sagellm.server.engine import Engine
from sagellm.server.openai.body_reading import UnknownFields
from sagellm.server.prometheus.serving_metrics import ServingMetrics
from sagellm.server.tokenization.tokenizer import Tokenizer

# A text of so many characters is encoded in about a millisecond; longer ones would hold up other streams.
_INLINE_CHARACTERS_MAX = 2048


@dataclass(frozen=True, slots=True)
class Serving:
    """The engine, the tokeniser and the settings of one application."""

    engine: Engine
    settings: AppSettings
    tokenizer: Tokenizer
    metrics: ServingMetrics
    encoders: ThreadPoolExecutor
    started_s: int  # when the application was made, in seconds since 1970: the model's "created"
    unknown_fields: UnknownFields = field(default_factory=UnknownFields)
    request_ids: set[str] = field(default_factory=set)  # in use

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; of a long one, beside the event loop."""
        if len(text) <= _INLINE_CHARACTERS_MAX:
            return self.tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.encoders, self.tokenizer.encode, text, add_special_tokens)

    def take_request_id(self, wanted: str) -> str:
        """A name that no unfinished request has: the wanted one, or it with something appended.

        Give it back with `request_ids.discard`.
        """
        request_id = wanted
        while request_id in self.request_ids:
            request_id = f"{wanted}-{secrets.token_hex(4)}"
        self.request_ids.add(request_id)
        return request_id


SERVING = web.AppKey("SERVING", Serving)
