"""A leg as SGLang's native ``/generate`` wants it."""

from __future__ import annotations

import orjson

from tidegate.core.errors import BadRequest
from tidegate.engines.seam import Json, Leg

_SAME = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"}
    | {"stop", "stop_token_ids", "ignore_eos", "logit_bias"}
    | {"skip_special_tokens", "spaces_between_special_tokens"}
)
_RENAMED = {
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "ebnf",
}


def generate_body(leg: Leg, prompt: list[int], max_new_tokens: int) -> Json:
    """Return the fields that both servers of a pair are sent, without those of the room.

    Raises BadRequest for a sampling field that has no counterpart.
    """
    sampling: Json = {"max_new_tokens": max_new_tokens}
    for name, value in leg.sampling.items():
        if name in _SAME:
            sampling[name] = value
        elif name in _RENAMED:
            as_text = name == "guided_json" and not isinstance(value, str)
            sampling[_RENAMED[name]] = orjson.dumps(value).decode() if as_text else value
        elif name not in ("logprobs", "top_logprobs"):
            raise BadRequest(f"{name}: SGLang servers do not know this field", param=name)
    # SGLang aborts every request whose id begins with the one it is given: no id may begin another.
    body: Json = {"rid": f"{leg.request_id}.", "input_ids": prompt, "sampling_params": sampling}
    if wants_logprobs(leg):
        body["return_logprob"] = True
        body["return_text_in_logprobs"] = True
        body["top_logprobs_num"] = leg.sampling.get("top_logprobs", int(leg.sampling["logprobs"]))
    if leg.salt:
        body["extra_key"] = leg.salt
    return body


def wants_logprobs(leg: Leg) -> bool:
    """Tell whether the client asked for logprobs: a number of a completion (0 is one), true of a chat."""
    return leg.sampling.get("logprobs") not in (None, False)
