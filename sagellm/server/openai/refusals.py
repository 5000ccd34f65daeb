"""Fields that are understood and cannot be honoured: an answer without them would be a wrong one."""

from sagellm.server.openai.body_reading import shortened
from sagellm.server.openai.errors import invalid
from sagellm.server.openai.request_bodies import ChatBody, CompletionBody, GenerationBody

_NOT_SERVED = {
    "structured_outputs": "output is not constrained to a grammar or schema here",
    "guided_json": "output is not constrained to a grammar or schema here",
    "guided_regex": "output is not constrained to a grammar or schema here",
    "guided_choice": "output is not constrained to a grammar or schema here",
    "guided_grammar": "output is not constrained to a grammar or schema here",
    "prompt_logprobs": "log-probabilities are given for output tokens only",
    "kv_transfer_params": "KV moves between this server's own instances only",
    "use_beam_search": "there is no beam search",
    "logits_processors": "clients cannot bring code",
}


def refuse_unsupported(body: CompletionBody | ChatBody) -> None:
    """Raise ApiError (400) where the request needs something that is not there."""
    for name, reason in _NOT_SERVED.items():
        value = getattr(body, name)
        if value is not None and value is not False:
            raise invalid(name, f"{name}: {shortened(value)}, must be absent: {reason}")
    _refuse_response_format(body)
    if isinstance(body, CompletionBody):
        _refuse_of_completion(body)
    else:
        _refuse_of_chat(body)


def _refuse_response_format(body: GenerationBody) -> None:
    wanted = body.response_format
    if wanted is not None and wanted.get("type") != "text":
        raise invalid(
            "response_format",
            f'response_format: {shortened(wanted)}, must be absent or {{"type": "text"}}: '
            "output is not constrained to a grammar or schema here",
        )


def _refuse_of_completion(body: CompletionBody) -> None:
    if body.suffix:
        raise invalid("suffix", f"suffix: {shortened(body.suffix)}, must be absent: text is only added at the end")
    if body.echo and body.logprobs is not None:
        raise invalid("echo", "echo: true, must be false with logprobs, which are given for output tokens only")


def _refuse_of_chat(body: ChatBody) -> None:
    for name in ("functions", "function_call"):
        if getattr(body, name) is not None:
            raise invalid(name, f"{name}: present, must be absent: OpenAI replaced it by tools")
    if body.modalities is not None and body.modalities != ["text"]:
        raise invalid("modalities", f'modalities: {shortened(body.modalities)}, must be ["text"]')
    tool_choice = body.tool_choice if body.tool_choice is not None else ("auto" if body.tools else "none")
    if tool_choice != "none" and (body.tools or tool_choice != "auto"):
        raise invalid(
            "tool_choice",
            f'tool_choice: {shortened(tool_choice)}, must be "none": tool calls are not parsed from the output here',
        )
