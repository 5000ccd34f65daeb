"""A real server process with the toy model: OpenAI's own Python client against it, and bad requests."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import msgspec
import openai
import pytest
from bad_requests import all_refused
from running_app import Client
from served_model import ServedModel, served_model

MODEL = "toy"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = tmp_path_factory.mktemp("served")
    with served_model(folder, "--single-process", "--api-key", "secret", "--served-model-name", MODEL) as model:
        yield model


@pytest.fixture
def client(served: ServedModel) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat_is_the_same_with_and_without_a_stream(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    wishes = {"model": MODEL, "messages": messages, "max_tokens": 24, "seed": 7, "temperature": 0.8}
    answer = client.chat.completions.create(**wishes)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    text, finish, usage = "", None, None
    for chunk in client.chat.completions.create(**wishes, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for each in chunk.choices:
            text += each.delta.content or ""
            finish = each.finish_reason or finish
    assert (text, finish) == (choice.message.content, choice.finish_reason)
    assert usage is not None
    assert usage.completion_tokens == answer.usage.completion_tokens


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    wishes = {"model": MODEL, "max_tokens": 5, "temperature": 0, "extra_body": {"ignore_eos": True}}
    both = client.completions.create(prompt=["Hello", "Good bye"], **wishes)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.usage is not None
    assert (both.usage.prompt_tokens, both.usage.completion_tokens) == (13, 10)
    by_ids = client.completions.create(prompt=[list(b"Hello"), list(b"Good bye")], **wishes)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in both.choices]


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI) -> None:
    wishes = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    answer = client.chat.completions.create(**wishes, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    for token in content.content:
        assert len(token.top_logprobs) == 3
        # Greedy: what was drawn is the most likely.
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert [each.logprob for each in token.top_logprobs] == sorted(
            (each.logprob for each in token.top_logprobs), reverse=True
        )


def test_several_choices_differ_and_can_be_had_again(client: openai.OpenAI) -> None:
    wishes = {"model": MODEL, "prompt": "Hello", "max_tokens": 12, "n": 3, "seed": 11, "temperature": 1.5}
    first = [choice.text for choice in client.completions.create(**wishes).choices]
    assert len(set(first)) == 3
    assert [choice.text for choice in client.completions.create(**wishes).choices] == first


def test_errors_are_the_clients_own_kinds(served: ServedModel, client: openai.OpenAI) -> None:
    idle = served.wait_until_idle()
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.chat.completions.create(model=MODEL, messages=messages, temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt="x", max_tokens=10**9)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    now = served.wait_until_idle()
    assert now["instances"] == idle["instances"]


def test_a_cancelled_stream_gives_its_blocks_back(served: ServedModel, client: openai.OpenAI) -> None:
    num_output_tokens = served.wait_until_idle()["num_output_tokens"]
    for _ in range(3):
        stream = client.completions.create(
            model=MODEL, prompt="x" * 64, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    figures = served.wait_until_idle()
    assert figures["num_output_tokens"] - num_output_tokens < 3000


def test_many_clients_at_once_leave_everything_as_it_was(served: ServedModel, client: openai.OpenAI) -> None:
    def ask(number: int) -> int:
        stream = client.completions.create(
            model=MODEL,
            prompt=f"Request {number}",
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        (usage,) = [chunk.usage for chunk in stream if chunk.usage]
        return usage.completion_tokens

    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(ask, range(64))) == [8] * 64
    served.wait_until_idle()


def test_bad_requests_change_nothing(served: ServedModel) -> None:
    """Everything of `test_rejected_inputs`, at the real server: blocks, queues and counts stay as they are."""

    async def test() -> None:
        headers = {"Authorization": "Bearer secret"}
        async with aiohttp.ClientSession(headers=headers) as session:
            client = Client(served.url, 0, session)
            model = msgspec.json.decode((await client.get("/v1/models"))[1])["data"][0]
            _, text = await client.post("/detokenize", {"tokens": [10**9]})
            vocab_size = int(text["error"]["message"].rpartition(" to ")[2]) + 1
            assert await all_refused(client, model["max_model_len"], vocab_size) > 200

    before = served.wait_until_idle()
    asyncio.run(test())
    after = served.wait_until_idle()
    for name in ("instances", "num_finished", "num_failed", "num_rejected", "num_prompt_tokens"):
        assert after[name] == before[name]
