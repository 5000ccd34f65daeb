"""Prompts made of messages: as the transformers library makes them, and refused where a template refuses."""

from pathlib import Path

import pytest
import small_tokenizers

from sagellm.server.openai.conversations import chat_prompt
from sagellm.server.openai.errors import ApiError
from sagellm.server.openai.request_bodies import ChatBody
from sagellm.server.tokenization.byte_tokenizer import ByteTokenizer
from sagellm.server.tokenization.chat_template import ChatTemplate, ChatTemplateError
from sagellm.server.tokenization.folder_tokenizer import FolderTokenizer

_TOOLS = [{"type": "function", "function": {"name": "näme", "parameters": {"type": "object", "b": 1, "a": [True]}}}]
_CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hällo <b>\n"},
    {"role": "assistant", "content": "Yes?", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    {"role": "user", "content": "Go on"},
]
_TEMPLATES = {
    "plain": small_tokenizers.TEMPLATE,
    "whitespace": "{% for m in messages %}\n  {% if m.role %}\n U {{ m.content }}\n {% endif %}\n{% endfor %}",
    "tools": "{% if tools %}{% for t in tools %}{{ t | tojson }}|{{ t | tojson(indent=2) }}{% endfor %}{% endif %}",
    "calls": "{% for c in messages[2].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "keywords": "{{ enable_thinking }}{{ messages | length }}{{ eos_token }}{{ undefined_name }}",
    "date": "{{ strftime_now('%Y') | length }}",
}


@pytest.mark.parametrize("name", list(_TEMPLATES))
def test_prompts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path, _TEMPLATES[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for adds_prompt in (False, True):
        expected = theirs.apply_chat_template(
            _CONVERSATION, tools=_TOOLS, add_generation_prompt=adds_prompt, tokenize=False, enable_thinking=False
        )
        rendered = FolderTokenizer(folder).chat_template.render(
            _CONVERSATION,
            add_generation_prompt=adds_prompt,
            variables={"tools": _TOOLS, "enable_thinking": False},
        )
        assert rendered == expected


def test_a_file_of_its_own_goes_before_the_configuration(tmp_path: Path) -> None:
    folder = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path)
    (folder / "chat_template.jinja").write_text("mine: {{ messages[0].content }}")
    assert FolderTokenizer(folder).chat_template.render([{"role": "user", "content": "x"}]) == "mine: x"
    given = FolderTokenizer(folder, "given: {{ messages[0].content }}").chat_template
    assert given.render([{"role": "user", "content": "x"}]) == "given: x"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[9].content.x }}",
        "{% for %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_an_error_of_the_request(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(template, {}).render([{"role": "user", "content": "x"}])


def test_without_a_template_the_client_is_told_what_to_do(tmp_path: Path) -> None:
    folder = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path, None)
    with pytest.raises(ChatTemplateError, match="/v1/completions"):
        FolderTokenizer(folder).chat_template.render([{"role": "user", "content": "x"}])


def _prompt(body: ChatBody, trusts_clients: bool = False) -> str:
    return chat_prompt(body, ByteTokenizer().chat_template, trusts_clients)


def test_a_final_message_can_be_continued() -> None:
    messages = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One, two,"}]
    body = ChatBody(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert _prompt(body) == "user: Count\nassistant: One, two,"


def test_parts_of_a_content_are_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert _prompt(ChatBody(messages=[{"role": "user", "content": parts}])) == "user: a\nb\nassistant:"


def test_a_clients_template_is_taken_only_from_trusted_clients() -> None:
    body = ChatBody(messages=[{"role": "user", "content": "x"}], chat_template="{{ messages[0].content * 2 }}")
    assert _prompt(body, trusts_clients=True) == "xx"
    with pytest.raises(ApiError, match="not trusted"):
        _prompt(body)


def test_keyword_arguments_cannot_replace_the_messages() -> None:
    body = ChatBody(messages=[{"role": "user", "content": "x"}], chat_template_kwargs={"messages": []})
    with pytest.raises(ApiError, match="a field of its own"):
        _prompt(body)
