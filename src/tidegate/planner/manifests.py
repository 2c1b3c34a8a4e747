"""A deployment as files: `vllm serve` command lines, a compose file, a Kubernetes manifest, the gateway.

The flags of a server are those that the fleet starts one with, and docs/engines/vllm.md explains. Written as
JSON values inside of YAML, which is YAML.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tidegate.core.instance import Role
from tidegate.core.slo import Slo
from tidegate.fleet.vllm import DEFAULT_FLAGS, nixl_config
from tidegate.planner.deployment import Deployment, PoolOf

IMAGE = "vllm/vllm-openai:v0.32.0"
HTTP_PORT, SIDE_PORT = 8000, 5600
NODE_GPUS = 8
START_S = 1800
"""How long weights may load."""

SYSTEM_FILE = '''"""The roles of a planned fleet: `tidegate serve --system {name}:planned`."""

from dataclasses import replace

from tidegate.core.instance import Role
from tidegate.policies.starting_roles import GivenRoles
from tidegate.systems import make_system
from tidegate.systems.registry import SystemOptions
from tidegate.systems.system import System


def planned(options: SystemOptions) -> System:
    roles = {roles}
    return replace(make_system({system!r}, slo=options.slo), name="planned", roles=GivenRoles(roles))
'''


@dataclass(frozen=True, slots=True)
class Server:
    """One replica: its number through all pools, and its name."""

    number: int
    pool: PoolOf

    @property
    def name(self) -> str:
        return f"{self.pool.role.label}-{self.number}"


def servers_of(chosen: Deployment) -> Iterator[Server]:
    """Yield the replicas in the order in which the gateway takes them."""
    number = 0
    for pool in chosen.pools:
        for _ in range(pool.count):
            yield Server(number, pool)
            number += 1


def serve_words(pool: PoolOf, model: str) -> list[str]:
    """Return the words behind `vllm serve` for a replica of a pool, without where it listens."""
    words = [
        model,
        "--served-model-name",
        model,
        "--tensor-parallel-size",
        str(pool.kind.tp),
        "--max-num-batched-tokens",
        str(pool.chunk_tokens),
    ]
    return [*words, *DEFAULT_FLAGS, "--kv-transfer-config", json.dumps(nixl_config(), separators=(",", ":"))]


def gateway_words(chosen: Deployment, slo: Slo, hosts: dict[str, str]) -> list[str]:
    """Return the words of the gateway in front of the servers at ``hosts``, by their names."""
    words = ["serve", "--slo", str(slo).replace(" ", "")]
    counts = {role: sum(pool.count for pool in chosen.pools if pool.role is role) for role in Role}
    if chosen.family == "disaggregated":
        words += ["--system", chosen.system, "--split", f"{counts[Role.PREFILL]}:{counts[Role.DECODE]}"]
    elif chosen.family in ("colocated", "adaptive"):
        words += ["--system", chosen.system]
    else:
        words += ["--system", "plan_system.py:planned"]
    for server in servers_of(chosen):
        words += ["--vllm", f"http://{hosts[server.name]}"]
    for server in servers_of(chosen):
        words += ["--profile", server.pool.kind.profile.name]
    return words


def system_file(chosen: Deployment) -> str:
    """Return the Python file that labels a fleet of which a part is mixed."""
    roles = " + ".join(f"(Role.{pool.role.name},) * {pool.count}" for pool in chosen.pools)
    return SYSTEM_FILE.format(name="plan_system.py", roles=roles, system=chosen.system)


def commands(chosen: Deployment, model: str, slo: Slo) -> str:
    """Return a shell script's lines: every server by hand, and the gateway. HOST_N stand for addresses."""
    lines = [
        "#!/bin/sh",
        f"# {chosen.title}: {chosen.instances} servers. Set HOST_0, HOST_1, ...",
    ]
    lines += ["# Run each line where its GPUs are; docs/engines/vllm.md says what each flag is for.", ""]
    hosts = {}
    on_node: dict[str, int] = {}
    for server in servers_of(chosen):
        pool, host = server.pool, f"HOST_{server.number}"
        first = on_node.get(pool.kind.gpu, 0)
        if first + pool.kind.tp > NODE_GPUS:
            first = 0
        on_node[pool.kind.gpu] = first + pool.kind.tp
        port, side = HTTP_PORT + first + 1, SIDE_PORT + first
        hosts[server.name] = f"${host}:{port}"
        devices = ",".join(str(first + each) for each in range(pool.kind.tp))
        words = shlex.join(serve_words(pool, model))
        lines += [
            f"# {server.name}: {pool.kind.title}",
            f"CUDA_VISIBLE_DEVICES={devices} VLLM_HOST_IP=${host} VLLM_NIXL_SIDE_CHANNEL_HOST=${host} "
            f"VLLM_NIXL_SIDE_CHANNEL_PORT={side} \\",
            f"  vllm serve {words} --host ${host} --port {port} &",
        ]
    gateway = " ".join(
        word if word.startswith("http://$") else shlex.quote(word)
        for word in gateway_words(chosen, slo, hosts)
    )
    return "\n".join([*lines, "", "# The gateway, once all are healthy:", f"tidegate {gateway}", ""])


def compose(chosen: Deployment, model: str, slo: Slo) -> str:
    """Return a compose file for one machine that has all GPUs; devices are numbered through."""
    services: list[str] = []
    device = 0
    for server in servers_of(chosen):
        pool = server.pool
        ids = [str(device + each) for each in range(pool.kind.tp)]
        device += pool.kind.tp
        services += [
            f"  {server.name}: # {pool.kind.title}",
            "    <<: *vllm",
            f"    command: {json.dumps(serve_words(pool, model))}",
            "    environment:",
            f"      VLLM_NIXL_SIDE_CHANNEL_HOST: {server.name}",
            f'      VLLM_NIXL_SIDE_CHANNEL_PORT: "{SIDE_PORT}"',
            "    deploy:",
            "      resources:",
            "        reservations:",
            "          devices:",
            f"            - {{driver: nvidia, device_ids: {json.dumps(ids)}, capabilities: [gpu]}}",
        ]
    hosts = {server.name: f"{server.name}:{HTTP_PORT}" for server in servers_of(chosen)}
    words = gateway_words(chosen, slo, hosts)
    waits = [f"      {name}: {{condition: service_healthy}}" for name in hosts]
    mounted = ["    volumes:", "      - ./plan_system.py:/plan_system.py:ro"]
    mounted = [*mounted, "    working_dir: /"] if chosen.family == "mixed" else []
    return "\n".join(
        [
            f"# {chosen.title}, for one machine with {device} GPUs; written by tidegate plan and not run.",
            "x-vllm: &vllm",
            f"  image: ${{VLLM_IMAGE:-{IMAGE}}}",
            "  ipc: host",
            "  ulimits: {memlock: -1}",
            "  volumes:",
            "    # Weights are fetched once, into the host's cache; HF_HOME names another folder for it.",
            "    - ${HF_HOME:-~/.cache/huggingface}:/root/.cache/huggingface",
            "  healthcheck:",
            f'    test: [CMD, curl, -fsS, "http://localhost:{HTTP_PORT}/health"]',
            "    interval: 10s",
            "    timeout: 5s",
            "    retries: 3",
            f"    start_period: {START_S}s",
            "  restart: always",
            "",
            "services:",
            *services,
            "  tidegate:",
            "    image: ${TIDEGATE_IMAGE:-tidegate}",
            f"    command: {json.dumps([*words, '--host', '0.0.0.0'])}",
            *mounted,
            "    environment:",
            "      TIDEGATE_API_KEY: ${TIDEGATE_API_KEY:?the key that clients send}",
            f'    ports: ["{HTTP_PORT}:{HTTP_PORT}"]',
            "    depends_on:",
            *waits,
            "    restart: always",
            "",
        ]
    )


def kubernetes(chosen: Deployment, model: str, slo: Slo) -> str:
    """Return a manifest: a StatefulSet and a headless Service per pool, and the gateway's Deployment."""
    documents: list[dict[str, object]] = []
    hosts: dict[str, str] = {}
    servers = servers_of(chosen)
    for index, pool in enumerate(chosen.pools):
        name = f"vllm-{pool.role.label}-{index}"
        for replica in range(pool.count):
            hosts[next(servers).name] = f"{name}-{replica}.{name}:{HTTP_PORT}"
        documents += [_headless(name), _stateful_set(name, pool, model)]
    words = [*gateway_words(chosen, slo, hosts), "--host", "0.0.0.0"]
    volumes: dict[str, object] = {}
    mounts: dict[str, object] = {}
    if chosen.family == "mixed":
        data = {"plan_system.py": system_file(chosen)}
        documents.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "plan-system"}, "data": data}
        )
        volumes = {"volumes": [{"name": "plan", "configMap": {"name": "plan-system"}}]}
        mounts = {"volumeMounts": [{"name": "plan", "mountPath": "/plan"}], "workingDir": "/plan"}
    secret = {"secretKeyRef": {"name": "tidegate", "key": "api-key"}}
    container: dict[str, object] = {
        "name": "tidegate",
        "image": "tidegate",
        "args": words,
        "env": [{"name": "TIDEGATE_API_KEY", "valueFrom": secret}],
        "ports": [{"containerPort": HTTP_PORT}],
        **mounts,
    }
    documents += [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "tidegate"},
            "spec": {
                "replicas": 1,
                "selector": {"matchLabels": {"app": "tidegate"}},
                "template": {
                    "metadata": {"labels": {"app": "tidegate"}},
                    "spec": {"containers": [container], **volumes},
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "tidegate"},
            "spec": {"selector": {"app": "tidegate"}, "ports": [{"port": HTTP_PORT}]},
        },
    ]
    head = f"# {chosen.title}; written by tidegate plan and not run. The Secret tidegate holds api-key.\n"
    return head + "".join(f"---\n{json.dumps(each, indent=2)}\n" for each in documents)


def _headless(name: str) -> dict[str, object]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "clusterIP": "None",
            # Peers find each other's side channel before they are ready.
            "publishNotReadyAddresses": True,
            "selector": {"app": name},
            "ports": [{"name": "http", "port": HTTP_PORT}, {"name": "nixl", "port": SIDE_PORT}],
        },
    }


def _stateful_set(name: str, pool: PoolOf, model: str) -> dict[str, object]:
    address = {"fieldRef": {"fieldPath": "status.podIP"}}
    gpus = {"nvidia.com/gpu": pool.kind.tp}
    health = {"httpGet": {"path": "/health", "port": HTTP_PORT}, "periodSeconds": 10}
    container = {
        "name": "vllm",
        "image": IMAGE,
        "args": serve_words(pool, model),
        "env": [
            {"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": address},
            {"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": str(SIDE_PORT)},
            {"name": "VLLM_HOST_IP", "valueFrom": address},
        ],
        "ports": [{"containerPort": HTTP_PORT}, {"containerPort": SIDE_PORT}],
        "resources": {"limits": gpus},
        "readinessProbe": health,
        "startupProbe": {**health, "failureThreshold": START_S // 10},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": name},
        "spec": {
            "serviceName": name,
            "replicas": pool.count,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name, "gpu": pool.kind.gpu}},
                "spec": {"containers": [container], "volumes": [memory]},
            },
        },
    }
