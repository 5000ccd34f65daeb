"""Prompts in all forms that clients send them in, to token ids that fit the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sagellm.server.app_settings import AppSettings
from sagellm.server.openai.body_reading import shortened
from sagellm.server.openai.conversations import chat_prompt
from sagellm.server.openai.errors import invalid
from sagellm.server.openai.options import GenerationOptions, check
from sagellm.server.openai.request_bodies import ChatBody, CompletionBody
from sagellm.server.openai.serving import Serving

_COMPLETION_MAX_TOKENS = 16  # where a completion says nothing, as in OpenAI's API


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, and how much may come out of it."""

    token_ids: tuple[int, ...]
    max_output_tokens: int
    text: str | None  # as it was sent; None where it came as token ids


async def completion_prompts(body: CompletionBody, options: GenerationOptions, serving: Serving) -> list[Prompt]:
    """The prompts of a completion request. Raises ApiError (400) where one is malformed, empty or too long."""
    prompts: list[Prompt] = []
    listed = _listed(body.prompt, serving.settings)
    most = serving.settings.num_prompts_max // len(listed)
    check(options.num_choices <= max(most, 1), "n", options.num_choices, f"at most {most} for {len(listed)} prompts")
    for given in listed:
        if isinstance(given, str):
            token_ids = await serving.encode(given, options.add_special_tokens is not False)
            prompts.append(_fitted(token_ids, given, _COMPLETION_MAX_TOKENS, options, serving.settings))
        else:
            _check_vocabulary(given, serving.settings.vocab_size)
            prompts.append(_fitted(given, None, _COMPLETION_MAX_TOKENS, options, serving.settings))
    return prompts


async def conversation_prompt(body: ChatBody, options: GenerationOptions, serving: Serving) -> Prompt:
    """The prompt of a chat request. Raises ApiError (400) where the messages are malformed or too long."""
    text = chat_prompt(body, serving.tokenizer.chat_template, serving.settings.trust_request_chat_template)
    # A template writes the special tokens itself.
    token_ids = await serving.encode(text, options.add_special_tokens is True)
    return _fitted(token_ids, text, None, options, serving.settings)


def _listed(prompt: str | list[Any] | None, settings: AppSettings) -> list[str | list[int]]:
    """All forms as a list of texts or lists of ids."""
    if prompt is None:
        raise invalid("prompt", "prompt: missing, must be a text, a list of token ids, or a list of either")
    if isinstance(prompt, str):
        return [prompt]
    check(len(prompt) > 0, "prompt", prompt, "not empty")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [prompt]
    check(len(prompt) <= settings.num_prompts_max, "prompt", prompt, f"at most {settings.num_prompts_max} prompts")
    are_texts = kinds == {str}
    are_ids = kinds == {list} and all(set(map(type, ids)) <= {int} for ids in prompt)
    check(are_texts or are_ids, "prompt", prompt, "all texts, all token ids, or all lists of token ids")
    return prompt


def _check_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    if token_ids:
        for worst in (min(token_ids), max(token_ids)):
            check(0 <= worst < vocab_size, "prompt", worst, f"token ids of 0 to {vocab_size - 1}")


def _fitted(
    token_ids: Sequence[int],
    text: str | None,
    default_max_tokens: int | None,
    options: GenerationOptions,
    settings: AppSettings,
) -> Prompt:
    """The prompt with the room that is left for its output; where no limit is given, all of it or the default."""
    if options.truncate_prompt_tokens is not None:
        token_ids = token_ids[-options.truncate_prompt_tokens :]
    param = "messages" if default_max_tokens is None else "prompt"
    num_tokens, most = len(token_ids), settings.max_model_len
    if num_tokens == 0:
        raise invalid(param, f"{param}: {shortened(text or '')} has no tokens, must have one or more")
    room = most - num_tokens
    if room < 1:
        raise invalid(
            param, f"{param}: {num_tokens} tokens, must be fewer than the {most} of the model's maximum context length"
        )
    if options.max_tokens is None:
        max_tokens = room if default_max_tokens is None else min(room, default_max_tokens)
        check(
            options.sampling.min_tokens <= max_tokens,
            "min_tokens",
            options.sampling.min_tokens,
            f"at most {max_tokens}",
        )
    elif options.max_tokens > room:
        raise invalid(
            "max_tokens",
            f"max_tokens: {options.max_tokens} with a prompt of {num_tokens} tokens comes to "
            f"{num_tokens + options.max_tokens}, must be at most the {most} of the model's maximum context length",
        )
    else:
        max_tokens = options.max_tokens
    return Prompt(tuple(token_ids), max_tokens, text)
