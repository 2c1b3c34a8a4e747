"""Frameworks over the OpenAI protocol."""

from __future__ import annotations

import litellm
import pytest
from langchain_openai import ChatOpenAI, OpenAI

MODEL = "tiny-llama"


def test_langchain_completes(gateway: str) -> None:
    llm = OpenAI(base_url=gateway + "/v1", api_key="none", model=MODEL, max_tokens=6, temperature=0)
    text = llm.invoke("hello")
    assert text and "".join(llm.stream("hello")) == text
    assert len(llm.generate(["hello", "The tide"]).generations) == 2


def test_langchain_chats(gateway: str) -> None:
    llm = ChatOpenAI(base_url=gateway + "/v1", api_key="none", model=MODEL, max_tokens=6, temperature=0)
    answer = llm.invoke("hello")
    assert answer.content and answer.usage_metadata is not None
    assert "".join(str(chunk.content) for chunk in llm.stream("hello")) == answer.content


@pytest.mark.filterwarnings("ignore")  # of its own making
def test_litellm(gateway: str) -> None:
    asked = {"model": "openai/" + MODEL, "api_base": gateway + "/v1", "api_key": "none", "max_tokens": 6}
    messages = [{"role": "user", "content": "hello"}]
    whole = litellm.completion(messages=messages, temperature=0, **asked)
    text = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in litellm.completion(messages=messages, temperature=0, stream=True, **asked)
    )
    assert whole.choices[0].message.content == text
    assert litellm.text_completion(
        prompt=["hello", "hi"], **asked | {"model": "text-completion-openai/" + MODEL}
    )
