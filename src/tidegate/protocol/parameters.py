"""Every parameter of completions and chat that vLLM or OpenAI documents, and what becomes of it.

An answer may come from one leg, from two on different instances, or from more after a migration or a replay,
so that "passed on" says too little. What is not here is refused by name: nothing is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tidegate.core.errors import BadRequest

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Where:
    """What becomes of a parameter, by the legs of its request."""

    one_leg: str
    two_legs: str
    moved: str


class Fate(Enum):
    """What becomes of a parameter. ``moved`` is a decode that migrates, or goes on after a fault."""

    GATEWAY = Where("the gateway answers for it", "the same", "the same")
    EVERY = Where("passed on", "passed to both", "passed to every leg")
    LEFT = Where("passed on", "both get what is left to do", "every leg gets what is left to do")
    STATE = Where("passed on", "both; the decode begins at the prompt again", "does not move; begins again")
    GUARDED = Where(
        "400 unless --allow-fields has it; then passed on", "passed to both", "passed to every leg"
    )
    ONCE = Where("passed on", "passed to the prefill, whose result is kept", "not passed again")
    NOTHING = Where("accepted, not passed on", "the same", "the same")
    REFUSED = Where("400", "400", "400")


@dataclass(frozen=True, slots=True)
class Parameter:
    """``neutral`` are values that ask for nothing. ``words`` end the refusal, or explain. ``keys`` of its
    object do what the guarded parameters do that they are given with here."""

    fate: Fate
    words: str = ""
    neutral: tuple[object, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)

    def asks_nothing(self, given: object) -> bool:
        """Tell whether it is as if the parameter had not been sent."""
        return given is None or given in self.neutral


GATEWAY, EVERY, LEFT, STATE = Fate.GATEWAY, Fate.EVERY, Fate.LEFT, Fate.STATE
GUARDED, ONCE, NOTHING, REFUSED = Fate.GUARDED, Fate.ONCE, Fate.NOTHING, Fate.REFUSED
PASSED = (EVERY, LEFT, STATE, GUARDED, ONCE)
RENDER = "only for vLLM's render endpoints"
RESERVED = "kept from engines: with it a client could reach the KV or the requests of others"
GUIDED = "vLLM has removed it; use structured_outputs or response_format"
LOOKS_BACK = "looks at what was generated"

_BOTH: dict[str, Parameter] = {
    "model": Parameter(GATEWAY),
    "max_tokens": Parameter(LEFT),
    "min_tokens": Parameter(LEFT),
    "n": Parameter(GATEWAY),
    "stream": Parameter(GATEWAY, "legs are streamed as the gateway needs it"),
    "stream_options": Parameter(GATEWAY),
    "user": Parameter(NOTHING),
    "seed": Parameter(
        STATE,
        "random numbers come in the order of an unbroken run; without effect at temperature 0",
    ),
    "stop": Parameter(LEFT, "the gateway looks for strings that legs say together"),
    "include_stop_str_in_output": Parameter(LEFT, "the gateway leaves out what engines say", (False,)),
    "temperature": Parameter(EVERY),
    "top_p": Parameter(EVERY, "", (1,)),
    "top_k": Parameter(EVERY, "", (0, -1)),
    "min_p": Parameter(EVERY, "", (0,)),
    "logit_bias": Parameter(EVERY, "", ({},)),
    "logprobs": Parameter(EVERY, "the rows of all legs, put together"),
    "logprob_token_ids": Parameter(EVERY, "the rows of all legs, put together", ([],)),
    "repetition_penalty": Parameter(EVERY, "counts prompt and answer alike", (1,)),
    "presence_penalty": Parameter(STATE, LOOKS_BACK, (0,)),
    "frequency_penalty": Parameter(STATE, LOOKS_BACK, (0,)),
    "bad_words": Parameter(STATE, LOOKS_BACK, ([],)),
    "repetition_detection": Parameter(STATE, LOOKS_BACK),
    "watermarking": Parameter(STATE, LOOKS_BACK, (False,)),
    "thinking_token_budget": Parameter(STATE, LOOKS_BACK, (-1,)),
    "structured_outputs": Parameter(STATE, LOOKS_BACK),
    "response_format": Parameter(STATE, LOOKS_BACK, ({"type": "text"},)),
    "vllm_xargs": Parameter(STATE, "nobody knows what extensions do; KV parameters are taken out", ({},)),
    "stop_token_ids": Parameter(EVERY, "", ([],)),
    "allowed_token_ids": Parameter(EVERY),
    "ignore_eos": Parameter(EVERY, "", (False,)),
    "skip_special_tokens": Parameter(EVERY, "", (True,)),
    "spaces_between_special_tokens": Parameter(EVERY, "", (True,)),
    "return_tokens_as_token_ids": Parameter(EVERY, "", (False,)),
    "stream_interval": Parameter(EVERY, "", (1,)),
    "prompt_logprobs": Parameter(
        ONCE,
        "not with stream; the leg that computes the prompt is answered in one piece",
    ),
    "return_token_ids": Parameter(GATEWAY),
    "cache_salt": Parameter(GATEWAY, "every leg gets a hash of it and of the tenant"),
    "kv_transfer_params": Parameter(NOTHING, RESERVED),
    "ec_transfer_params": Parameter(NOTHING, RESERVED),
    "request_id": Parameter(NOTHING, RESERVED),
    "session_id": Parameter(NOTHING, "the header x-session-id names a conversation"),
    "priority": Parameter(GATEWAY, "of waiting requests lower ones go first; 0 at least for a tenant"),
    "use_beam_search": Parameter(REFUSED, "beams do not move between instances", (False,)),
    "length_penalty": Parameter(REFUSED, "only for beam search", (1,)),
    "best_of": Parameter(GATEWAY, "no more than n"),
    "truncate_prompt_tokens": Parameter(REFUSED, "an engine that cuts the prompt makes KV of other tokens"),
    "truncation_side": Parameter(REFUSED, "only for truncate_prompt_tokens"),
    "return_token_offsets": Parameter(REFUSED, RENDER, (False,)),
    "mm_payload": Parameter(REFUSED, RENDER, ("tensors",)),
    "return_mm_kwargs": Parameter(REFUSED, RENDER, (True,)),
    "routed_experts_prompt_start": Parameter(REFUSED, "answers have no routed_experts", (0,)),
    "logits_processors": Parameter(REFUSED, "vLLM has removed it", ([],)),
    "guided_json": Parameter(REFUSED, GUIDED),
    "guided_regex": Parameter(REFUSED, GUIDED),
    "guided_choice": Parameter(REFUSED, GUIDED),
    "guided_grammar": Parameter(REFUSED, GUIDED),
    "guided_decoding_backend": Parameter(REFUSED, GUIDED),
    "guided_whitespace_pattern": Parameter(REFUSED, GUIDED),
}

_COMPLETIONS: dict[str, Parameter] = {
    "prompt": Parameter(GATEWAY, "later legs get its token ids, and those of the answer so far"),
    "echo": Parameter(GATEWAY),
    "add_special_tokens": Parameter(EVERY, "decides until the prompt is token ids", (True,)),
    "suffix": Parameter(ONCE, "goes into the token ids of the prompt"),
    "prompt_embeds": Parameter(REFUSED, "legs are put together by token ids"),
}

_CHAT: dict[str, Parameter] = {
    "messages": Parameter(GATEWAY, "later legs get its token ids, too, and those of the answer so far"),
    "max_completion_tokens": Parameter(LEFT),
    "top_logprobs": Parameter(EVERY, "the rows of all legs, put together", (0,)),
    "tools": Parameter(STATE, "a parser reads the answer; not with tool_choice none", ([],)),
    "tool_choice": Parameter(EVERY, "", ("none",)),
    "parallel_tool_calls": Parameter(EVERY, "", (True,)),
    "include_reasoning": Parameter(STATE, "a parser reads the answer", (True,)),
    "add_special_tokens": Parameter(EVERY, "decides until the prompt is token ids", (False,)),
    "reasoning_effort": Parameter(EVERY, "decides until the prompt is token ids"),
    "add_generation_prompt": Parameter(EVERY, "decides until the prompt is token ids", (True,)),
    "continue_final_message": Parameter(EVERY, "decides until the prompt is token ids", (False,)),
    "documents": Parameter(EVERY, "decides until the prompt is token ids"),
    "chat_template": Parameter(GUARDED, "vLLM wants --trust-request-chat-template"),
    "chat_template_kwargs": Parameter(
        EVERY,
        "decides until the prompt is token ids; its chat_template and tokenize need what chat_template needs",
        ({},),
        {"chat_template": "chat_template", "tokenize": "chat_template"},
    ),
    "media_io_kwargs": Parameter(GUARDED, "vLLM wants --trust-request-mm-kwargs", ({},)),
    "mm_processor_kwargs": Parameter(GUARDED, "vLLM wants --trust-request-mm-kwargs", ({},)),
    "echo": Parameter(REFUSED, "answers have no text without tokens", (False,)),
    "return_prompt_text": Parameter(REFUSED, "answers have no prompt_text", (False,)),
    "functions": Parameter(REFUSED, "deprecated; use tools", ([],)),
    "function_call": Parameter(REFUSED, "deprecated; use tool_choice", ("none",)),
    "modalities": Parameter(REFUSED, "answers are text", (["text"],)),
    "audio": Parameter(REFUSED, "answers are text"),
    "verbosity": Parameter(REFUSED, "no engine knows it", ("medium",)),
    "web_search_options": Parameter(REFUSED, "no engine searches"),
    "metadata": Parameter(NOTHING),
    "store": Parameter(NOTHING, "nothing is stored"),
    "service_tier": Parameter(GATEWAY, "priority is a priority of -1, flex of 1, all others 0"),
    "prediction": Parameter(NOTHING, "would change times only"),
    "safety_identifier": Parameter(NOTHING),
    "prompt_cache_key": Parameter(NOTHING),
    "prompt_cache_retention": Parameter(NOTHING),
}

PARAMETERS: Mapping[bool, Mapping[str, Parameter]] = {False: _BOTH | _COMPLETIONS, True: _BOTH | _CHAT}
"""By whether it is a chat's, and by name."""
GUARDABLE = frozenset(name for name, parameter in _CHAT.items() if parameter.fate is GUARDED)
"""Parameters that run or configure code in a vLLM server: clients may send those that the operator allows."""


def check_guarded(value: Json, allowed: Collection[str]) -> None:
    """Raise BadRequest for a guarded field of a decoded body that asks for something and is not ``allowed``.
    Holds for chats and for texts to tokenise; other completions do not know these fields."""
    for name, given in value.items():
        parameter = _CHAT.get(name)
        if parameter is None or parameter.asks_nothing(given):
            continue
        found = [name] if parameter.fate is GUARDED and name not in allowed else []
        if isinstance(given, dict):
            found += [
                f"{name}.{key}"
                for key, same in parameter.keys.items()
                if key in given and same not in allowed
            ]
        if found:
            raise BadRequest(f"{found[0]}: not taken from clients (--allow-fields)", param=found[0])


def passed_on(value: Json, *, chat: bool, allowed: Collection[str]) -> Json:
    """Return the fields of a decoded body that engines get. Raises BadRequest for one that is not known, that
    is guarded and not ``allowed``, or that is not supported and asks for something."""
    table = PARAMETERS[chat]
    given = {name: wanted for name, wanted in value.items() if wanted is not None}
    if unknown := [name for name in given if name not in table]:
        plural = "s" if len(unknown) > 1 else ""
        raise BadRequest(f"unknown parameter{plural}: {', '.join(unknown)}", param=unknown[0])
    for name, wanted in given.items():
        parameter = table[name]
        if parameter.fate is REFUSED and not parameter.asks_nothing(wanted):
            raise BadRequest(f"{name}: not supported: {parameter.words}", param=name)
    check_guarded(given, allowed)
    return {name: wanted for name, wanted in given.items() if table[name].fate in PASSED}
