"""The models that a server of the dialect has, as OpenAI lists them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.core.errors import UnknownModel

Json = dict[str, Any]


def model_list(served: Mapping[str, int], created: int) -> Json:
    """Return the list of ``served`` models, with their contexts in tokens; ``created`` is in Unix seconds."""
    return {"object": "list", "data": [_card(name, served[name], created) for name in sorted(served)]}


def model_card(served: Mapping[str, int], created: int, asked: str) -> Json:
    """Return one model's entry. Raises UnknownModel."""
    if asked not in served:
        raise UnknownModel(f"model {asked!r} is not served here; served: {', '.join(sorted(served))}")
    return _card(asked, served[asked], created)


def _card(name: str, max_model_len: int, created: int) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "tidegate",
        "root": name,
        "parent": None,
        "max_model_len": max_model_len,
    }
