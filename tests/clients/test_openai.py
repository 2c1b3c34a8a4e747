"""The official OpenAI client."""

from __future__ import annotations

import openai
import pytest
from pydantic import BaseModel

MODEL = "tiny-llama"
SAY = [{"role": "user", "content": "Say something."}]


@pytest.fixture(scope="module")
def client(gateway: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway + "/v1", api_key="none", max_retries=0)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL and model.created > 1_600_000_000
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another/model")


def test_a_chat_streamed_and_whole_says_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=12, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=SAY,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None and whole.usage is not None and usage.total_tokens == whole.usage.total_tokens


async def test_the_asynchronous_client(gateway: str) -> None:
    async with (
        openai.AsyncOpenAI(base_url=gateway + "/v1", api_key="none") as client,
        # Its helper raises for an answer that the limit ended, so the model is to end its turn itself.
        client.chat.completions.stream(model=MODEL, messages=SAY, stop=[" "], max_tokens=200) as stream,
    ):
        async for _ in stream:
            pass
        answer = await stream.get_final_completion()
    assert answer.choices[0].finish_reason == "stop"


def test_prompts_as_a_list_get_a_choice_each(client: openai.OpenAI) -> None:
    prompts = ["The tide", "A gate", "Two boats"]
    apart = [client.completions.create(model=MODEL, prompt=p, max_tokens=6, temperature=0) for p in prompts]
    together = client.completions.create(model=MODEL, prompt=prompts, max_tokens=6, temperature=0)
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == [one.choices[0].text for one in apart]
    assert together.usage is not None
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in apart if one.usage)
    streamed = ["", "", ""]
    for chunk in client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=6, temperature=0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in together.choices]


def test_prompts_as_token_ids(client: openai.OpenAI) -> None:
    one = client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4, temperature=0)
    listed = client.completions.create(model=MODEL, prompt=[[5, 6, 7]], max_tokens=4, temperature=0)
    assert one.choices[0].text == listed.choices[0].text


def test_n_choices(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=8, n=3, seed=1)
    assert sorted(choice.index for choice in made.choices) == [0, 1, 2]
    assert len({choice.message.content for choice in made.choices}) > 1
    assert made.usage is not None and made.usage.completion_tokens > 8


def test_log_probabilities_spell_the_content(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=60, seed=3, temperature=1,
        logprobs=True, top_logprobs=2,
    )  # fmt: skip
    (choice,) = made.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    spelt = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert spelt.decode("utf-8", "replace") == choice.message.content


def test_offsets_point_at_the_text(client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=MODEL, prompt="The tide", max_tokens=40, seed=0, temperature=1, logprobs=3
    )
    (choice,) = made.choices
    assert choice.logprobs is not None and choice.logprobs.tokens and choice.logprobs.text_offset
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if "\ufffd" not in token and not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token


def test_errors_have_their_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=-1)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=SAY)
    with pytest.raises(openai.BadRequestError, match=r"[Ii]mage|text"):
        client.chat.completions.create(
            model=MODEL,
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}],
                }
            ],
        )


class Weather(BaseModel):
    city: str


def test_a_parsed_answer_is_served_or_refused_in_words(client: openai.OpenAI) -> None:
    """The embedded engine has no guided decoding, and says so."""
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.parse(model=MODEL, messages=SAY, response_format=Weather, max_tokens=20)


def test_every_answer_has_an_id(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=SAY, max_tokens=2, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=SAY, max_tokens=-1)
    assert refused.value.request_id
