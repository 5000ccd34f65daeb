"""All answers to one request, read side by side, and what they come to in tokens."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec

from sagellm.server.openai.generation import Generation, Piece
from sagellm.server.openai.prompts import Prompt


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


@dataclass(frozen=True, slots=True)
class Answers:
    """Answer ``index`` is to prompt ``index // num_choices``."""

    request_id: str
    created_s: int
    prompts: Sequence[Prompt]
    generations: Sequence[Generation]
    num_choices: int

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.num_choices]

    def usage(self) -> Usage:
        """Tokens so far. Each prompt counts once, whatever the number of its answers."""
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        num_output_tokens = sum(generation.num_output_tokens for generation in self.generations)
        num_cached_tokens = sum(
            max(generation.num_cached_tokens for generation in self.generations[start : start + self.num_choices])
            for start in range(0, len(self.generations), self.num_choices)
        )
        return Usage(
            num_prompt_tokens,
            num_output_tokens,
            num_prompt_tokens + num_output_tokens,
            PromptTokensDetails(num_cached_tokens),
        )

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all answers as they come, each with its answer's index. Raises ApiError as `Generation` does."""
        if len(self.generations) == 1:
            async for piece in self.generations[0].pieces():
                yield 0, piece
            return
        async for each in _side_by_side(self.generations):
            yield each

    def close(self) -> None:
        """Stop whatever of it still runs."""
        for generation in self.generations:
            generation.close()


async def _side_by_side(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all as they come. A slow reader holds the readers up, too, so little is kept here."""
    queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue(maxsize=len(generations))

    async def read(index: int, generation: Generation) -> None:
        try:
            async for piece in generation.pieces():
                await queue.put((index, piece))
        except Exception:
            await queue.put((index, None))
            raise
        await queue.put((index, None))

    readers = [asyncio.ensure_future(read(index, each)) for index, each in enumerate(generations)]
    try:
        num_open = len(readers)
        while num_open:
            index, piece = await queue.get()
            if piece is None:
                num_open -= 1
                await readers[index]  # raises what the reader failed with
            else:
                yield index, piece
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
