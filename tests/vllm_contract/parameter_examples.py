"""A value for every parameter that asks for something."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

TOOL: Json = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
EXAMPLES: Json = {
    **dict.fromkeys(("model",), "tiny"),
    "max_tokens": 9,
    "max_completion_tokens": 9,
    "min_tokens": 5,
    "n": 1,
    "best_of": 1,
    "echo": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "user": "u",
    "seed": 7,
    "stop": "zzz",
    "include_stop_str_in_output": True,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "logit_bias": {"3": -1},
    "logprobs": 1,
    "top_logprobs": 2,
    "logprob_token_ids": [1, 2],
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "bad_words": ["tide"],
    "repetition_detection": {"max_pattern_size": 9, "min_count": 9},
    "watermarking": True,
    "thinking_token_budget": 5,
    "structured_outputs": {"regex": "[a-e ]{9,20}"},
    "vllm_xargs": {"a": 1},
    "response_format": {"type": "json_object"},
    "stop_token_ids": [500],
    "ignore_eos": True,
    "allowed_token_ids": [1, 2, 3, 4, 5, 6, 7],
    "skip_special_tokens": False,
    "stream_interval": 3,
    "spaces_between_special_tokens": False,
    "add_special_tokens": True,
    "prompt_logprobs": 1,
    "return_tokens_as_token_ids": True,
    "return_token_ids": True,
    "cache_salt": "theirs",
    "kv_transfer_params": {"remote_engine_id": "theirs"},
    "ec_transfer_params": {"a": "theirs"},
    "request_id": "theirs",
    "session_id": "theirs",
    "priority": -9,
    "use_beam_search": True,
    "length_penalty": 2.0,
    "truncate_prompt_tokens": 3,
    "truncation_side": "left",
    "return_token_offsets": True,
    "mm_payload": "none",
    "return_mm_kwargs": False,
    "routed_experts_prompt_start": 2,
    "logits_processors": ["theirs"],
    "suffix": "tide",
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), "x"),
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern"), "x"),
    "prompt_embeds": "AAAA",
    "prompt": "the tide",
    "messages": [{"role": "user", "content": "tide"}],
    "tools": [TOOL],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "include_reasoning": False,
    "reasoning_effort": "low",
    "add_generation_prompt": False,
    "continue_final_message": True,
    "documents": [{"title": "t", "text": "x"}],
    "chat_template": "x",
    "chat_template_kwargs": {"a": 1},
    "media_io_kwargs": {"image": {"a": 1}},
    "mm_processor_kwargs": {"a": 1},
    "return_prompt_text": True,
    "functions": [{"name": "tide"}],
    "function_call": "auto",
    "modalities": ["audio"],
    "audio": {"a": 1},
    "verbosity": "low",
    "web_search_options": {},
    "metadata": {"a": "theirs"},
    "store": True,
    "service_tier": "flex",
    "prediction": {"type": "content"},
    "safety_identifier": "theirs",
    "prompt_cache_key": "theirs",
    "prompt_cache_retention": "24h",
}
NEEDED: dict[str, Json] = {
    "top_logprobs": {"logprobs": True},
    "logprob_token_ids": {"logprobs": 1},
    "return_tokens_as_token_ids": {"logprobs": 1},
    "stream_options": {"stream": True},
    "continue_final_message": {"add_generation_prompt": False},
}
"""What has to come with a parameter."""


def asking(name: str, *, chat: bool) -> Json:
    """Return a greedy body with the parameter in it."""
    body: Json = {"max_tokens": 12, "temperature": 0}
    body |= {"messages": EXAMPLES["messages"]} if chat else {"prompt": list(range(1, 9))}
    if name == "suffix":
        body["prompt"] = EXAMPLES["prompt"]
    given = EXAMPLES[name]
    if chat and name == "logprobs":
        given = True
    needed = NEEDED.get(name, {})
    if chat and "logprobs" in needed:
        needed = {"logprobs": True}
    return body | needed | {name: given}
