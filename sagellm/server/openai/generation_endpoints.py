"""``POST /v1/completions`` and ``POST /v1/chat/completions``."""

import secrets
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec
from aiohttp import web

from sagellm.core.identity import RequestId
from sagellm.core.request import RequestSpec
from sagellm.server.openai.answer_form import AnswerForm
from sagellm.server.openai.answers import Answers
from sagellm.server.openai.body_reading import read_body
from sagellm.server.openai.chat_form import ChatForm
from sagellm.server.openai.completion_form import CompletionForm
from sagellm.server.openai.errors import ApiError
from sagellm.server.openai.event_stream import ClientGoneError, EventStream
from sagellm.server.openai.generation import Generation, Piece
from sagellm.server.openai.options import GenerationOptions, check_model, read_options
from sagellm.server.openai.prompts import Prompt, completion_prompts, conversation_prompt
from sagellm.server.openai.request_bodies import ChatBody, CompletionBody
from sagellm.server.openai.request_ids import request_id_of
from sagellm.server.openai.serving import SERVING, Serving

_SEED_SPAN = 1 << 64


async def completions(request: web.Request) -> web.StreamResponse:
    """Go on with one text or several."""
    serving = request.app[SERVING]
    arrival_ns = serving.engine.now_ns()
    _check_open(serving)
    body = read_body(await request.read(), CompletionBody, serving.unknown_fields)
    check_model(body.model, serving.settings)
    options = read_options(body, serving.settings, serving.tokenizer)
    prompts = await completion_prompts(body, options, serving)
    answers = _submitted(request, "cmpl", prompts, options, serving, arrival_ns)
    form = CompletionForm(
        answers, options, serving.tokenizer, body.model or serving.settings.model_name, body.echo is True
    )
    return await _answered(request, answers, form, options, serving)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """Answer a conversation."""
    serving = request.app[SERVING]
    arrival_ns = serving.engine.now_ns()
    _check_open(serving)
    body = read_body(await request.read(), ChatBody, serving.unknown_fields)
    check_model(body.model, serving.settings)
    options = read_options(body, serving.settings, serving.tokenizer)
    prompt = await conversation_prompt(body, options, serving)
    answers = _submitted(request, "chatcmpl", [prompt], options, serving, arrival_ns)
    form = ChatForm(answers, options, serving.tokenizer, body.model or serving.settings.model_name)
    return await _answered(request, answers, form, options, serving)


def _check_open(serving: Serving) -> None:
    """Raise ApiError (503) where nothing new is taken."""
    if not serving.engine.is_alive:
        raise ApiError(503, "no instance of the model is left", retry_after_s=serving.settings.retry_after_s)
    if serving.engine.is_draining:
        raise ApiError(503, "the server is shutting down", retry_after_s=serving.settings.retry_after_s)


def _submitted(
    request: web.Request,
    prefix: str,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    serving: Serving,
    arrival_ns: int,
) -> Answers:
    """The request's answers, with a core request for each that is submitted when its pieces are read."""
    request_id = f"{prefix}-{options.request_id or request_id_of(request)}"
    # A client may use a name twice at a time, or again while a request that it gave up is being stopped.
    core_id = f"{request_id}-{secrets.token_hex(4)}"
    num_answers = len(prompts) * options.num_choices
    generations = [
        Generation(
            serving.engine,
            serving.tokenizer,
            _spec(
                core_id if num_answers == 1 else f"{core_id}-{index}",
                prompts[index // options.num_choices],
                options,
                arrival_ns,
                index % options.num_choices,
            ),
            options,
            serving.settings.retry_after_s,
        )
        for index in range(num_answers)
    ]
    return Answers(request_id, int(time.time()), prompts, generations, options.num_choices)


def _spec(request_id: str, prompt: Prompt, options: GenerationOptions, arrival_ns: int, choice: int) -> RequestSpec:
    """What the core is asked. Choices of one prompt differ in their seed only."""
    half = _SEED_SPAN // 2
    seed = (options.sampling.seed + choice + half) % _SEED_SPAN - half
    return RequestSpec(
        request_id=RequestId(request_id),
        arrival_ns=arrival_ns,
        num_prompt_tokens=len(prompt.token_ids),
        max_output_tokens=prompt.max_output_tokens,
        priority=options.priority,
        prompt_token_ids=prompt.token_ids,
        cache_salt=options.cache_salt,
        stop_token_ids=options.stop_token_ids,
        sampling=msgspec.structs.replace(options.sampling, seed=seed),
    )


async def _answered(
    request: web.Request, answers: Answers, form: AnswerForm, options: GenerationOptions, serving: Serving
) -> web.StreamResponse:
    """The response. However it ends, also by the client's going, nothing of the request runs on afterwards."""
    stream = EventStream(request, serving.settings.write_timeout_s)
    try:
        if not options.is_streamed:
            return await _whole(answers, form)
        return await _streamed(stream, answers, form, options)
    except ClientGoneError:
        assert stream.response is not None, "nobody goes before something was written"
        return stream.response
    finally:
        answers.close()
        _count(answers, options, serving)


def _count(answers: Answers, options: GenerationOptions, serving: Serving) -> None:
    for start in range(0, len(answers.generations), options.num_choices):
        prompt, first = answers.prompt_of(start), answers.generations[start]
        num_computed = len(prompt.token_ids) - first.num_cached_tokens
        serving.metrics.observe_answer(options.num_choices, prompt.max_output_tokens, num_computed)


async def _whole(answers: Answers, form: AnswerForm) -> web.Response:
    pieces: list[list[Piece]] = [[] for _ in answers.generations]
    async for index, piece in answers.pieces():
        pieces[index].append(piece)
    body = msgspec.json.encode(form.whole(pieces, answers.usage()))
    return web.Response(body=body, content_type="application/json")


async def _streamed(
    stream: EventStream, answers: Answers, form: AnswerForm, options: GenerationOptions
) -> web.StreamResponse:
    """Nothing is sent before the first token is there, so that a refusal is an HTTP error to the client."""
    try:
        async for index, piece in answers.pieces():
            await stream.send(form.chunk(index, piece, answers.usage() if options.continuous_usage else None))
    except ApiError as error:
        if stream.response is None:
            raise
        return await stream.fail(error)
    except ClientGoneError:
        raise
    except Exception:
        if stream.response is not None:
            with suppress(ClientGoneError):
                await stream.fail(ApiError(500, "the server failed on this request; its log says how"))
        raise
    return await stream.end([form.usage_chunk(answers.usage())] if options.include_usage else [])
