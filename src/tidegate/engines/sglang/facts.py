"""What a running SGLang server says about itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate.core.errors import SetupError
from tidegate.core.instance import Role
from tidegate.engines.seam import Json

BOOTSTRAP_PORT = 8998
"""SGLang's default for ``--disaggregation-bootstrap-port``."""
ROLES = {"prefill": Role.PREFILL, "decode": Role.DECODE}
GRAPH_FIELDS = ("decode_cuda_graph_bs", "decode_cuda_graph_memory_gb")
_WIDTHS = {
    "dp_size": "data parallelism",
    "ep_size": "expert parallelism",
    "pp_size": "pipeline parallelism",
    "dcp_size": "decode context parallelism",
}


@dataclass(frozen=True, slots=True)
class SglangFacts:
    """A server's model, KV cache and role.

    ``max_model_len`` is one token less than the server's context: some versions refuse a request that
    fills it.
    ``fixed_role`` says why the role cannot be switched while the server runs; "" when it can.
    ``decode_graphs`` holds what another server must be told to capture the same decode CUDA graphs when it
    becomes a decode server; empty on one that has captured none.
    """

    model: str
    role: Role
    max_model_len: int
    kv_capacity_tokens: int
    block_tokens: int
    bootstrap_port: int
    fixed_role: str = ""
    hidden_states: bool = False
    decode_graphs: Json = field(default_factory=dict)


def read_facts(info: Json, models: Json, model_info: Json) -> SglangFacts:
    """Read the answers of ``/server_info``, ``/v1/models`` and ``/model_info``.

    Raises SetupError for a server that cannot be used, saying how to start one that can.
    """
    try:
        states = info.get("internal_states") or [{}]
        # The server's arguments keep the role it was launched with; its scheduler knows the one it has.
        mode = states[0].get("disaggregation_mode") or info["disaggregation_mode"]
        listed = models["data"][0]
        model, context = str(listed["id"]), int(listed["max_model_len"])
        capacity = int(info["max_total_num_tokens"])
        block_tokens = int(info.get("page_size") or 1)
        port = int(info.get("disaggregation_bootstrap_port") or BOOTSTRAP_PORT)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SetupError(f"the server's description lacks a field or has a wrong one: {error!r}") from None
    if not model_info.get("is_generation", True):
        raise SetupError(f"{model} does not generate text")
    if mode not in ROLES:
        raise SetupError(
            f"the server runs without prefill-decode disaggregation (mode {mode!r}); "
            "start it with --disaggregation-mode prefill or decode"
        )
    return SglangFacts(
        model=model,
        role=ROLES[mode],
        max_model_len=context - 1,
        kv_capacity_tokens=capacity,
        block_tokens=block_tokens,
        bootstrap_port=port,
        fixed_role=_fixed_role(info),
        hidden_states=bool(info.get("enable_return_hidden_states")),
        decode_graphs={name: states[0][name] for name in GRAPH_FIELDS if states[0].get(name)},
    )


def _fixed_role(info: Json) -> str:
    """Return why ``/pd_role_switch`` would be refused, "" if it would not."""
    if not info.get("enable_pd_role_switch"):
        return "it was started without --enable-pd-role-switch"
    unsupported = [name for key, name in _WIDTHS.items() if int(info.get(key) or 1) > 1]
    if info.get("enable_dp_attention"):
        unsupported.append("DP attention")
    if info.get("speculative_algorithm"):
        unsupported.append("speculative decoding")
    return f"SGLang does not switch roles with {', '.join(unsupported)}" if unsupported else ""
