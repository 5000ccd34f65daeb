"""What every handler needs, in one place."""

import asyncio
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

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; of a long one, beside the event loop."""
        if len(text) <= _INLINE_CHARACTERS_MAX:
            return self.tokenizer.encode(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.encoders, self.tokenizer.encode, text, add_special_tokens)


SERVING = web.AppKey("SERVING", Serving)
