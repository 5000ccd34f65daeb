"""What a request asks for, checked: sampling, ends of output, and the shape of the answer."""

import secrets
from dataclasses import dataclass

from sagellm.core.sampling import SamplingParameters
from sagellm.server.app_settings import AppSettings
from sagellm.server.openai.body_reading import shortened
from sagellm.server.openai.errors import ApiError, invalid
from sagellm.server.openai.refusals import refuse_unsupported
from sagellm.server.openai.request_bodies import ChatBody, CompletionBody, GenerationBody
from sagellm.server.tokenization.tokenizer import Tokenizer

_SEED_BITS = 63
_INT64_MAX = (1 << 63) - 1
_NAME_CHARACTERS_MAX = 256


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """One request's wishes, without its prompt. All numbers are within their ranges."""

    is_streamed: bool
    include_usage: bool
    continuous_usage: bool
    num_choices: int
    max_tokens: int | None
    sampling: SamplingParameters
    stop_strings: tuple[str, ...]
    stop_token_ids: tuple[int, ...]  # the model's own ends too
    eos_token_ids: tuple[int, ...]  # of these, those that nobody had to name
    include_stop_in_output: bool
    skip_special_tokens: bool
    add_special_tokens: bool | None  # None: as is usual for the kind of request
    truncate_prompt_tokens: int | None  # so many of the prompt's last tokens are kept
    priority: int
    cache_salt: str
    request_id: str | None
    return_token_ids: bool
    tokens_as_ids: bool


def check(condition: bool, name: str, value: object, wish: str) -> None:
    """Refuse the request where the condition does not hold."""
    if not condition:
        raise invalid(name, f"{name}: {shortened(value)}, must be {wish}")


def read_options(body: CompletionBody | ChatBody, settings: AppSettings, tokenizer: Tokenizer) -> GenerationOptions:
    """The body's wishes. Raises ApiError where one is out of range, contradicts another, or cannot be met."""
    refuse_unsupported(body)
    max_tokens = _max_tokens(body)
    stream_options = body.stream_options
    if stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options: present, must be absent unless stream is true")
    include_usage = bool(stream_options and stream_options.include_usage)
    eos_token_ids = () if body.ignore_eos else _eos_token_ids(settings, tokenizer)
    _check_token_ids("stop_token_ids", body.stop_token_ids, settings.vocab_size)
    return GenerationOptions(
        is_streamed=bool(body.stream),
        include_usage=include_usage,
        continuous_usage=include_usage and bool(stream_options and stream_options.continuous_usage_stats),
        num_choices=_num_choices(body, settings),
        max_tokens=max_tokens,
        sampling=_sampling(body, max_tokens, settings, tokenizer),
        stop_strings=_stop_strings(body, settings),
        stop_token_ids=tuple(dict.fromkeys((*eos_token_ids, *(body.stop_token_ids or ())))),
        eos_token_ids=eos_token_ids,
        include_stop_in_output=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        add_special_tokens=body.add_special_tokens,
        truncate_prompt_tokens=_truncate_prompt_tokens(body, settings),
        priority=_priority(body),
        cache_salt=_cache_salt(body),
        request_id=checked_request_id(body.request_id, "request_id"),
        return_token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
    )


def checked_request_id(request_id: str | None, name: str) -> str | None:
    """A client's name for its request: printable, so that it can stand in a header and a log."""
    if request_id is None:
        return None
    is_fit = 0 < len(request_id) <= _NAME_CHARACTERS_MAX and request_id.isascii() and request_id.isprintable()
    check(is_fit, name, request_id, f"1 to {_NAME_CHARACTERS_MAX} printable ASCII characters")
    return request_id


def _max_tokens(body: CompletionBody | ChatBody) -> int | None:
    name, max_tokens = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        name, max_tokens = "max_completion_tokens", body.max_completion_tokens
    if max_tokens is not None:
        check(1 <= max_tokens <= _INT64_MAX, name, max_tokens, "an integer of 1 or more")
    return max_tokens


def _eos_token_ids(settings: AppSettings, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = dict.fromkeys((*tokenizer.eos_token_ids, *settings.eos_token_ids))
    return tuple(token_id for token_id in ids if token_id < settings.vocab_size)


def _num_choices(body: CompletionBody | ChatBody, settings: AppSettings) -> int:
    num_choices = 1 if body.n is None else body.n
    check(1 <= num_choices <= settings.num_choices_max, "n", num_choices, f"1 to {settings.num_choices_max}")
    if isinstance(body, CompletionBody) and body.best_of is not None:
        check(body.best_of == num_choices, "best_of", body.best_of, f"n ({num_choices}): no more are tried than given")
    return num_choices


def _sampling(
    body: CompletionBody | ChatBody, max_tokens: int | None, settings: AppSettings, tokenizer: Tokenizer
) -> SamplingParameters:
    _check_ranges(body)
    min_tokens = body.min_tokens or 0
    check(0 <= min_tokens <= settings.max_model_len, "min_tokens", min_tokens, f"0 to {settings.max_model_len}")
    if max_tokens is not None:
        check(min_tokens <= max_tokens, "min_tokens", min_tokens, f"at most max_tokens ({max_tokens})")
    _check_token_ids("allowed_token_ids", body.allowed_token_ids, settings.vocab_size)
    check(body.allowed_token_ids != [], "allowed_token_ids", [], "one token id or more")
    return SamplingParameters(
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        # Drawn here, so that the log has it and the run can be repeated.
        seed=secrets.randbits(_SEED_BITS) if body.seed is None else body.seed,
        min_tokens=min_tokens,
        logit_bias=_logit_bias(body, settings.vocab_size),
        allowed_token_ids=tuple(body.allowed_token_ids or ()),
        bad_words=_bad_words(body, tokenizer),
        num_logprobs=_num_logprobs(body, settings),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _check_ranges(body: GenerationBody) -> None:
    """The sampling numbers, each by itself. Comparisons are such that NaN fails them."""
    if body.temperature is not None:
        check(0 <= body.temperature <= 2, "temperature", body.temperature, "0 to 2")
    if body.top_p is not None:
        check(0 < body.top_p <= 1, "top_p", body.top_p, "above 0 and at most 1")
    if body.top_k is not None:
        check(-1 <= body.top_k <= _INT64_MAX, "top_k", body.top_k, "1 or more, or 0 or -1 for no limit")
    if body.min_p is not None:
        check(0 <= body.min_p <= 1, "min_p", body.min_p, "0 to 1")
    if body.repetition_penalty is not None:
        check(0 < body.repetition_penalty < 1e6, "repetition_penalty", body.repetition_penalty, "above 0")
    for name in ("presence_penalty", "frequency_penalty"):
        value: float | None = getattr(body, name)
        if value is not None:
            check(-2 <= value <= 2, name, value, "-2 to 2")
    if body.seed is not None:
        check(-_INT64_MAX - 1 <= body.seed <= _INT64_MAX, "seed", body.seed, "an integer of 64 bits")


def _logit_bias(body: GenerationBody, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases: list[tuple[int, float]] = []
    for key, bias in (body.logit_bias or {}).items():
        is_id = key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size
        check(is_id, "logit_bias", key, f"keyed by token ids, 0 to {vocab_size - 1}")
        check(-100 <= bias <= 100, "logit_bias", {key: bias}, "-100 to 100 for each token")
        biases.append((int(key), bias))
    return tuple(biases)


def _bad_words(body: GenerationBody, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as it is spelled at a text's start, and after a space."""
    found: dict[tuple[int, ...], None] = {}
    for word in body.bad_words or ():
        check(bool(word.strip()), "bad_words", word, "words that are not empty")
        for text in (word, " " + word.lstrip()):
            found[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    return tuple(found)


def _num_logprobs(body: CompletionBody | ChatBody, settings: AppSettings) -> int | None:
    most = settings.logprobs_max
    if isinstance(body, CompletionBody):
        if body.logprobs is not None:
            check(0 <= body.logprobs <= most, "logprobs", body.logprobs, f"0 to {most}")
        return body.logprobs
    if body.top_logprobs is not None:
        check(0 <= body.top_logprobs <= most, "top_logprobs", body.top_logprobs, f"0 to {most}")
        if not body.logprobs and body.top_logprobs:
            raise invalid("top_logprobs", f"top_logprobs: {body.top_logprobs}, must be absent unless logprobs is true")
    return (body.top_logprobs or 0) if body.logprobs else None


def _stop_strings(body: GenerationBody, settings: AppSettings) -> tuple[str, ...]:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    check(len(stop) <= settings.num_stops_max, "stop", stop, f"at most {settings.num_stops_max} strings")
    check(all(stop), "stop", stop, "strings that are not empty")
    return tuple(dict.fromkeys(stop))


def _check_token_ids(name: str, token_ids: list[int] | None, vocab_size: int) -> None:
    if token_ids:
        for worst in (min(token_ids), max(token_ids)):
            check(0 <= worst < vocab_size, name, worst, f"token ids of 0 to {vocab_size - 1}")


def _truncate_prompt_tokens(body: GenerationBody, settings: AppSettings) -> int | None:
    num_kept = body.truncate_prompt_tokens
    if num_kept is None:
        return None
    most = settings.max_model_len
    check(num_kept == -1 or 1 <= num_kept <= most, "truncate_prompt_tokens", num_kept, f"1 to {most}, or -1")
    return most - 1 if num_kept == -1 else num_kept


def _priority(body: GenerationBody) -> int:
    priority = body.priority or 0
    check(abs(priority) < 1 << 31, "priority", priority, "an integer of 32 bits")
    return priority


def _cache_salt(body: GenerationBody) -> str:
    if body.cache_salt is None:
        return ""
    check(0 < len(body.cache_salt) <= 1024, "cache_salt", body.cache_salt, "1 to 1024 characters")
    return body.cache_salt


def check_model(name: str | None, settings: AppSettings) -> None:
    """A request that names no model gets the one that there is. Raises ApiError (404) for an unknown name."""
    if name is not None and name not in settings.model_names:
        raise ApiError(404, f"model: {shortened(name)} is not served here, must be {settings.model_name!r}", "model")
