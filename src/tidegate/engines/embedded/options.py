"""The configuration of an engine and the command line of its process."""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from tidegate.core.errors import ConfigError
from tidegate.engines.serving.process import instance_parser
from tidegate.engines.serving.secret import API_KEY_ENV

DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")

COUNTS = (
    ("--kv-memory-mb", 64, "MB", "memory for KV"),
    ("--block-tokens", 16, "TOKENS", "tokens of a KV block"),
    ("--max-batch-tokens", 512, "TOKENS", "tokens of one step"),
    ("--max-num-seqs", 256, "N", "requests of one step"),
    ("--threads", 1, "N", "CPU threads of the model"),
)
"""Flags that take a whole number from 1 on: default, unit, meaning."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How an engine is built.

    ``total_blocks`` None derives the pool from ``kv_memory_mb``. ``max_model_len`` None takes the model's
    own, and never exceeds what the pool holds. ``max_batch_tokens`` bounds the tokens of one step.
    ``order`` is that in which waiting requests are admitted, ``chunks`` says how much of prompts joins
    decodes (``BatchScheduler.price``). ``threads`` applies to the whole process.
    ``pace`` is a profile, as ``load_profile`` takes it, whose steps those of the engine are stretched to.
    ``predictor`` is the file of a head that predicts lengths, ``off``, or ``auto`` for one of the package.
    """

    model: Path
    engine_id: str = "embedded"
    dtype: str = "auto"
    device: str = "cpu"
    block_tokens: int = 16
    total_blocks: int | None = None
    kv_memory_mb: int = 256
    max_model_len: int | None = None
    max_batch_tokens: int = 512
    max_num_seqs: int = 256
    order: str = "fifo"
    chunks: str = "fixed"
    lease_s: float = 30.0
    threads: int = 1
    pace: str = ""
    predictor: str = "auto"

    def __post_init__(self) -> None:
        if self.max_batch_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_batch_tokens {self.max_batch_tokens} is below max_num_seqs {self.max_num_seqs}: "
                "a full batch of decodes would not fit one step"
            )


@dataclass(frozen=True, slots=True)
class Options:
    """The flags of an instance, checked; defaults suit the tiny model."""

    engine: EngineConfig
    host: str
    port: int
    kv_host: str
    served_model_name: str
    self_profile: bool
    shared_memory: bool
    ready_fd: int | None
    secret_file: Path | None
    api_key: str
    exit_with_parent: bool
    tell_stages: bool
    log_level: str


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """Parse the command line; prints usage and exits with status 2 when it is wrong."""
    parser = _parser()
    values = vars(parser.parse_args(argv))
    if values["kv_host"] in ("", "0.0.0.0", "::"):
        parser.error(f"--kv-host {values['kv_host']!r} names no address that a peer could connect to")
    values["served_model_name"] = values["served_model_name"] or values["model"].name
    values["engine_id"] = values["engine_id"] or f"embedded-{uuid.uuid4().hex[:12]}"
    key = os.environ.pop(API_KEY_ENV, "")
    values["api_key"] = values["api_key"] or key
    of_engine = {part.name: values.pop(part.name) for part in fields(EngineConfig) if part.name in values}
    try:
        return Options(EngineConfig(**of_engine), **values)
    except ConfigError as error:
        parser.error(error.message)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65536:
        raise argparse.ArgumentTypeError(f"{value} is not a port")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 86400:
        raise argparse.ArgumentTypeError(f"{text} is not a length of time")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = instance_parser("embedded", "Serve one model on one device in vLLM's HTTP dialect.")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder in the Hugging Face layout")
    add("--port", type=_port, default=0, help="port of the HTTP server; 0 takes a free one")
    add("--kv-host", default="127.0.0.1", help="address where peers pull KV (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="default: what the model says")
    add(
        "--max-model-len",
        type=_positive,
        metavar="TOKENS",
        help="default: the model's, if the KV memory holds it",
    )
    for flag, default, metavar, what in COUNTS:
        add(flag, type=_positive, default=default, metavar=metavar, help=f"{what} (default: %(default)s)")
    add("--pace", default="", metavar="FILE|NAME", help="profile that steps take as long as; default: none")
    add("--engine-id", default="", metavar="ID", help="name in KV handles; new for every start if not given")
    add("--served-model-name", default="", metavar="NAME", help="default: the folder's name")
    add(
        "--predictor",
        default="auto",
        metavar="FILE",
        help="length head; auto: the packaged one for the model, if there is one; off: none",
    )
    add(
        "--lease-s",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="how long pinned KV waits for a peer (default: %(default)s)",
    )
    add("--no-self-profile", dest="self_profile", action="store_false", help="skip the measurement at start")
    add(
        "--no-shared-memory",
        dest="shared_memory",
        action="store_false",
        help="pull KV over TCP even from the same host",
    )
    add("--tell-stages", action="store_true", help="say on stdout how far the start is")
    add("--ready-fd", type=int, metavar="N", help="write the ready line to this descriptor, not to stdout")
    add("--secret-file", type=Path, metavar="FILE", help="file with the launch secret")
    add(
        "--api-key",
        default="",
        metavar="KEY",
        help=f"needed to ask the engine for anything; better passed as {API_KEY_ENV}",
    )
    return parser
