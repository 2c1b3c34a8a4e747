"""Promises of the settings: one precedence, every problem at once, nothing ignored in silence."""

from __future__ import annotations

import runpy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from tidegate.cli import launch
from tidegate.cli.config import FLAGS, SECTIONS, SETTINGS
from tidegate.cli.fleet_config import EngineSection
from tidegate.cli.main import build_app
from tidegate.cli.sources import Resolved, as_toml, resolve
from tidegate.core.errors import ConfigError, TraceError
from tidegate.core.slo import Slo
from tidegate.dataplane.replica import EngineSettings
from tidegate.engines.embedded.options import DTYPES
from tidegate.fleet.emulated import EmulatedLaunch
from tidegate.fleet.vllm import KvSetup
from tidegate.gateway.settings import GatewaySettings
from tidegate.policies.dopd.controller import DopdController
from tidegate.systems import SYSTEMS, make_system

ROOT = Path(__file__).parents[2]


def settle(
    toml: str = "",
    environment: Mapping[str, str] | None = None,
    *,
    folder: Path | None = None,
    warnings: list[str] | None = None,
    **flags: Any,
) -> Resolved:
    file = None
    if folder is not None:
        file = folder / "s.toml"
        file.write_text(toml)
    heard = [] if warnings is None else warnings
    return resolve(file, environment or {}, flags, warn=heard.append)


def problems(*args: Any, **kwargs: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        settle(*args, **kwargs)
    return caught.value.problems


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = "[gateway]\nport = 1\nhost = 'h1'\n[fleet]\ninstances = 5\n"
    env = {"TIDEGATE_PORT": "2", "TIDEGATE_HOST": "h2"}
    done = settle(file, env, folder=tmp_path, port=3)
    assert done.config.gateway.port == 3
    assert done.config.gateway.host == "h2"
    assert done.config.fleet.instances == (5, 5)
    assert done.config.engine.dtype == "auto"
    assert done.origins["port"] == "--port"
    assert done.origins["host"] == "TIDEGATE_HOST"
    assert done.origins["instances"].endswith("s.toml: fleet.instances")
    assert done.origins["dtype"] == "default"


def test_every_problem_of_every_source_is_reported_at_once(tmp_path: Path) -> None:
    file = "port = 1\n[gateway]\nprot = 2\n[flet]\nx = 1\n[fleet]\ninstances = 0\n[engine]\ndtype = 'int4'\n"
    found = problems(file, {"TIDEGATE_SLO": "fast"}, folder=tmp_path, system="nope", split="1-2")
    text = "\n".join(found)
    assert len(found) == 8
    assert "s.toml: port: belongs in the section [gateway]" in text
    assert "gateway.prot: unknown setting; did you mean gateway.port?" in text
    assert "[flet]: unknown section; did you mean [fleet]?" in text
    assert "fleet.instances = 0: expected N instances, or A..B" in text
    assert "engine.dtype = int4: should be 'auto', 'float32'" in text
    assert "TIDEGATE_SLO fast:" in text
    assert "--system nope: unknown system 'nope'; there are: always-local, " in text
    assert "--split 1-2: expected P:D" in text


@pytest.mark.parametrize(
    ("toml", "complaint"),
    [
        ("[gateway\n", "not valid TOML"),
        ("gateway = 3\n", "gateway is a section"),
        ("[gateway]\nport = true\n", "port = true: expected a whole number"),
        ("[gateway]\nport = 80.5\n", "expected a whole number"),
        ("[gateway]\nport = 65536\n", "less than or equal to 65535"),
        ("[gateway]\napi_key = ''\n", "one word of printable ASCII"),
        ("[gateway]\njournal = '/'\n", "is a folder"),
        ("[gateway]\nstall_timeout = 0\n", "stall_timeout = 0: should be greater than 0"),
        ("[gateway]\nstall_timeout = true\n", "expected a number of seconds"),
        ("[gateway]\nrequest_timeout = inf\n", "finite number"),
        ("[fleet]\nvllm = ['https://h']\n", "plain http only"),
        ("[gateway]\nslo = 'ttft:1,tpot:1'\n", "belongs in the section [scheduling]"),
        ("[fleet]\nvllm = []\n", "expected a list of URLs"),
        ("[fleet]\nvllm = ['h:8000']\n", "is not a server's URL"),
        ("[fleet]\nvllm = ['http://h', 'http://h/v1']\n", "more than once"),
        ("[fleet]\nmodel = '/no/such'\n", "no such model"),
        ("[engine]\ndevice = 'gpu'\n", "device = gpu"),
        ("[gateway]\nallow_fields = ['chat_templates']\n", "none of chat_template, media_io_kwargs"),
        ("[gateway]\ntrusted_proxies = ['10.0.0.0/33']\n", "does not appear to be an IPv4 or IPv6 network"),
        ("[scheduling]\nsplit = '0:3'\n", "each at least 1"),
        ("[scheduling]\nsplit = '1:1'\n", "split 1:1 adds up to 2, the fleet has 3"),
        ("[scheduling]\nsystem = 'colocated'\nsplit = '1:2'\n", "no split"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, toml: str, complaint: str) -> None:
    (found,) = problems(toml, folder=tmp_path)
    assert complaint in found


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        resolve(tmp_path / "none.toml", {}, {}, warn=lambda _: None)


def test_a_variable_that_names_nothing_only_warns() -> None:
    heard: list[str] = []
    env = {"TIDEGATE_PROT": "1", "TIDEGATE_PORT_8000_TCP": "tcp://10.0.0.1:8000", "TIDEGATE_HOST": ""}
    done = settle(environment=env, warnings=heard)
    assert done.config.gateway.host == "127.0.0.1"
    assert any("did you mean TIDEGATE_PORT?" in text for text in heard)
    (found,) = problems(environment={"TIDEGATE_PORT": "tcp://10.0.0.1:8000"})
    assert "service link" in found


def test_a_list_in_the_environment_is_split() -> None:
    done = settle(environment={"TIDEGATE_VLLM": "http://a:1, http://b:2"}, system="static")
    assert done.config.fleet.vllm == ["http://a:1", "http://b:2"]
    assert done.config.first_size == 2


def test_a_stronger_source_replaces_the_rival_of_a_setting(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    (model / "config.json").touch()
    file = "[fleet]\nvllm = ['http://a']\n"
    assert settle(file, folder=tmp_path, model=model).config.fleet.vllm is None
    file = f"[fleet]\nmodel = '{model}'\ninstances = 5\n[engine]\nkv_memory_mb = 8\n"
    done = settle(file, folder=tmp_path, system="static", vllm=("http://a", "http://b"))
    assert done.config.fleet.model is None and done.config.first_size == 2


def test_rivals_and_settings_without_effect_in_one_source_are_refused() -> None:
    found = problems(model="/m", vllm=["http://a"], instances=2, device="cpu")
    assert "--model and --vllm exclude each other; give one" in found
    assert "--instances: has no effect together with --vllm" in found
    assert "--device: has no effect together with --vllm" in found


def test_emulated_instances_take_settings_that_nothing_else_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--host-ms: has no effect without --emulate" in problems(host_ms=2.0)
    (found,) = problems(emulate=["h100_sxm/llama-3.1-8b:2"], front_ms=float("nan"))
    assert found.startswith("--front-ms")
    taken = settle(emulate=["h100_sxm/llama-3.1-8b:2"], chunk_tokens=512, host_ms=2.0).config
    begun: list[EmulatedLaunch] = []
    monkeypatch.setattr(launch, "EmulatedFleet", begun.append)
    launch.make_fleet(taken, taken.make_system())
    launched = begun[0].argv(begun[0].groups)
    assert launched[launched.index("--max-batch-tokens") + 1] == "512"
    assert launched[launched.index("--host-s") + 1] == "0.002"


def test_a_system_that_needs_profiles_is_refused_for_servers_that_bring_none() -> None:
    (found,) = problems(vllm=["http://a", "http://b"], system="arrow-lending")
    assert "'arrow-lending' needs a measured profile" in found and "round-robin, static" in found


def test_a_profile_lets_any_system_run_in_front_of_servers(tmp_path: Path) -> None:
    name = "h100_sxm/llama-3.1-8b"
    done = settle(vllm=["http://a", "http://b"], profile=[name])
    assert (done.config.scheduling.system, done.origins["system"]) == ("tidegate", "default")
    system = done.config.make_system()
    assert system.order.held and system.chunks is None, "vLLM takes neither an order nor a budget per step"
    assert settle(as_toml(done), folder=tmp_path).config == done.config
    assert settle(environment={"TIDEGATE_PROFILE": name}, vllm=["http://a", "http://b"], system="arrow-v1")
    (found,) = problems(vllm=["http://a", "http://b"], profile=["no/such.json"])
    assert found.startswith("--profile no/such.json: cannot read")
    (found,) = problems(vllm=["http://a", "http://b", "http://c"], profile=[name, name])
    assert "2 profiles for 3 servers" in found
    assert "--profile: has no effect without --vllm or --launch" in problems(profile=[name])
    file = f"[fleet]\nvllm = ['http://a', 'http://b']\nprofile = '{name}'\n"
    assert settle(file, folder=tmp_path, emulate=[f"{name}:4"]).config.first_size == 4


def test_in_front_of_servers_the_control_plane_keeps_an_order() -> None:
    (found,) = problems(vllm=["http://a", "http://b"], system="static+edf")
    assert "needs a measured profile" in found
    servers: dict[str, Any] = {"vllm": ["http://a", "http://b"], "profile": ["h100_sxm/llama-3.1-8b"]}
    system = settle(**servers, system="static+edf").config.make_system()
    assert (system.name, system.order.held, system.order.in_engines.name) == ("static+edf", True, "fifo")
    assert not settle(**servers, system="static").config.make_system().order.held
    assert settle(**servers, system="ampd").config.make_system().order.held
    (found,) = problems(system="arrow-lending+lifo")
    listed = "edf, feasible-first, feasible-sjf, fifo, length"
    assert f"unknown order 'lifo'; did you mean 'fifo'? There are: {listed}" in found
    config = settle(system="arrow-lending+feasible-first").config
    assert config.make_system().name == "arrow-lending+feasible-first"
    assert not config.make_system().order.held


def test_a_chunk_budget_per_step_is_refused_in_front_of_servers() -> None:
    (found,) = problems(vllm=["http://a"], system="static", chunks="slack")
    assert "--max-num-batched-tokens" in found
    chunks = settle(system="static", chunks="slack").config.make_system().chunks
    assert chunks is not None and chunks.name == "slack"


def test_servers_alone_are_enough() -> None:
    done = settle(vllm=["http://a"])
    assert (done.config.scheduling.system, done.origins["system"]) == ("static", "default")
    assert settle(vllm=["http://a", "http://b"], split="1:1").config.scheduling.split == (1, 1)
    assert settle(vllm=["http://a"], system="round-robin").config.scheduling.system == "round-robin"


def test_launched_servers_take_a_model_and_words_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    done = settle(launch="vllm", model=tmp_path, instances=2, vllm_args="-tp 2 --max-model-len 4096")
    assert (done.config.scheduling.system, done.config.first_size) == ("static", 2)
    assert settle(as_toml(done), folder=tmp_path).config == done.config
    (found,) = problems(launch="vllm")
    assert "--launch vllm needs a --model DIR" in found
    (found,) = problems(launch="vllm", model=tmp_path, vllm_args="--port 8000")
    assert "--port is tidegate's to choose" in found
    (found,) = problems(launch="vllm", model=tmp_path, vllm_args="--api-key 'half a quote")
    assert "No closing quotation" in found
    (found,) = problems(launch="vllm", model=tmp_path, kv_memory_mb=64)
    assert found == "--kv-memory-mb: has no effect together with --launch"
    assert problems(vllm_args="-tp 2") == ["--vllm-args: has no effect without --launch"]
    assert "--launch and --emulate exclude each other; give one" in problems(launch="vllm", emulate=["x:1"])
    recompute = (
        """--kv-transfer-config '{"kv_connector":"NixlConnector","kv_load_failure_policy":"recompute"}'"""
    )
    (found,) = problems(launch="vllm", model=tmp_path, vllm_args=recompute)
    assert "can hang a request whose KV is lost" in found


def test_how_kv_of_running_servers_moves_is_told() -> None:
    servers = ["http://a", "http://b"]
    peers = ["http://a:9000", "http://b:9000"]
    done = settle(vllm=servers, kv_connector="mooncake", kv_lease_s="20", kv_bootstrap=peers)
    assert done.config.fleet.kv == KvSetup("mooncake", 20.0, bootstraps=peers)
    assert settle(vllm=servers).config.fleet.kv == KvSetup()
    (found,) = problems(vllm=servers, kv_bootstrap=peers)
    assert found == "--kv-bootstrap is only for --kv-connector mooncake"
    (found,) = problems(vllm=servers, kv_connector="mooncake", kv_bootstrap=["http://a:9000"])
    assert found == "1 bootstrap URLs for 2 servers: give one for each"
    assert "--kv-lease-s: has no effect without --vllm" in problems(kv_lease_s=9)


def test_every_dtype_of_the_engine_is_a_setting() -> None:
    assert get_args(EngineSection.model_fields["dtype"].annotation) == DTYPES
    assert settle(dtype="float64").config.engine.dtype == "float64"


def test_the_key_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-1\n")
    done = settle(environment={"TIDEGATE_API_KEY": "sk-2"}, api_key_file=tmp_path / "key")
    assert done.config.gateway.api_key == "sk-1"
    done = settle(environment={"TIDEGATE_API_KEY_FILE": str(tmp_path / "key")}, api_key="sk-3")
    assert done.config.gateway.api_key == "sk-3"
    (found,) = problems(api_key_file=tmp_path / "none")
    assert "--api-key-file" in found and "cannot be read" in found


def test_no_key_is_ever_shown(tmp_path: Path) -> None:
    done = settle(
        api_key="sk-secret", system="static", vllm=["http://a", "http://b"], vllm_api_key="sk-other"
    )
    assert "sk-" not in repr(done.config) + as_toml(done)
    assert "********" in as_toml(done)
    assert "s3cret" not in "".join(problems(api_key="my s3cret key"))


def test_the_printed_configuration_reads_back_as_the_same(tmp_path: Path) -> None:
    done = settle(
        port=9,
        split="1:2",
        stall_timeout=0.5,
        slo="ttft:500,tpot:20",
        host='q"\\\n',
        journal=tmp_path / "j.jsonl",
    )
    text = as_toml(done)
    assert set(tomllib.loads(text)) == set(SECTIONS)
    again = settle(text, folder=tmp_path)
    assert again.config == done.config
    urls = settle(vllm=["http://a:1", "http://b:2"], system="static")
    assert settle(as_toml(urls), folder=tmp_path).config == urls.config


def test_setting_names_are_unique_and_the_help_says_what_systems_and_defaults_there_are() -> None:
    assert len(SETTINGS) == sum(len(kind.model_fields) for kind in SECTIONS.values())
    assert set(SETTINGS) - set(FLAGS) == {"tenants", "vllm_api_key"}, (
        "a key on the command line is visible to others"
    )
    serve = typer.main.get_command(build_app(["serve"])).commands["serve"]  # type: ignore[attr-defined]
    told = {option.name: option for option in serve.params}
    assert told["port"].show_default == "8000" and told["kv_read_back"].show_default == "False"
    for system in SYSTEMS.names():
        assert f"{system} ({make_system(system).summary})" in told["system"].help
    assert SECTIONS["emulated"]().chunk_tokens == EngineSettings().max_batch_tokens


def test_the_page_of_settings_is_that_of_this_version() -> None:
    written = runpy.run_path(str(ROOT / "scripts" / "settings_page.py"))
    assert written["page"]() == (ROOT / "docs" / "settings.md").read_text(), "run scripts/settings_page.py"


def test_the_gateway_gets_every_setting_of_its_section() -> None:
    given: dict[str, Any] = {
        "host": "h",
        "port": 9,
        "api_key": "k",
        "journal": Path("j"),
        "request_timeout": 3.0,
    }
    made = settle(**given, stall_timeout=2.0, slo="ttft:5,tpot:7").config.gateway_settings()
    assert made == GatewaySettings(
        "h", 9, "k", Slo(0.005, 0.007), Path("j"), request_deadline_s=3.0, stall_s=2.0
    )
    assert settle().config.gateway_settings() == GatewaySettings()


def test_a_fleet_may_have_a_range_which_reads_back(tmp_path: Path) -> None:
    done = settle(folder=tmp_path, instances="2..8")
    assert (done.config.fleet.range, done.config.first_size) == ((2, 8), 2)
    assert 'instances = "2..8"' in as_toml(done)
    emulated = settle(emulate=["h100_sxm/llama-3.1-8b:1", "h200_sxm/llama-3.1-8b:2..5"], split="1:3").config
    assert (emulated.fleet.range, emulated.first_size) == ((3, 6), 4)
    assert emulated.fleet.groups(4) == ("h100_sxm/llama-3.1-8b:1", "h200_sxm/llama-3.1-8b:3..5")
    assert "expected N instances, or A..B" in problems(instances="8..2")[0]
    assert "expected at most 256 instances" in problems(instances="2..300")[0]


def test_what_a_system_that_sizes_the_fleet_cannot_have_is_named(tmp_path: Path) -> None:
    sized: dict[str, Any] = {"system": "dopd", "instances": "2..8"}
    for budget, most in (({"budget": 4}, 4), ({"price": 2.5, "budget_per_hour": 9.0}, 3), ({}, 8)):
        (controller,) = settle(**sized, **budget).config.make_system().controllers
        assert isinstance(controller, DopdController) and controller.fleet == (2, most)
    assert "--budget 1 allows 1 instances, and the fleet has at least 2" in problems(**sized, budget=1)[0]
    assert "two pools take at least 2" in problems(system="dopd", instances="1..4")[0]
    assert "--budget-per-hour: has no effect without --price" in problems(**sized, budget_per_hour=9.0)
    (tmp_path / "config.json").write_text("{}")
    found = problems(system="dopd", launch="vllm", model=tmp_path, instances="2..4")
    assert "system 'dopd' needs a measured profile" in found[0]
    assert "--instances: has no effect together with --vllm" in problems(vllm=["http://a"], instances="2..4")
    assert "no packaged profile is called" in problems(emulate=["h100/nothing:2..4"])[0]
    forecast = problems(forecast_period=0, forecast_steps=0, forecast_from=tmp_path / "none.jsonl")
    assert len(forecast) == 3 and any("there is no such file" in each for each in forecast)


def test_a_system_begins_with_the_answers_of_a_file(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + 40 * "0,15000,150\n")
    settled = settle(warm_start=trace), settle()
    warm, cold = (each.config.make_system().controllers[-1].initial() for each in settled)
    assert warm.warm and not cold.warm
    assert "follows no lengths" in problems(system="static", warm_start=trace)[0]
    begun = tmp_path / "begun.jsonl"
    begun.write_text('{"type":"header"}\n')
    assert settle(warm_start=begun).config.answered() == ()
    neither = tmp_path / "neither.txt"
    neither.write_text("neither\n")
    with pytest.raises(TraceError, match="unknown column 'neither'"):
        settle(warm_start=neither)


@pytest.mark.parametrize("name", ["warm_start", "forecast_from"])
def test_what_a_gateway_begins_with_may_be_the_journal_that_it_is_to_write(tmp_path: Path, name: str) -> None:
    own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    assert "there is no such file" in problems(**{name: own})[0]
    assert "there is no such file" in problems(**{name: other}, journal=own)[0]
    file = f"[gateway]\njournal = '{own}'\n"
    given: dict[str, Any] = {name: own}
    assert settle(file, folder=tmp_path, **given).config.answered() == ()
    own.touch()
    assert settle(file, folder=tmp_path, **given).config.answered() == ()
    assert "follows no lengths" in problems(system="static", warm_start=own, journal=own)[0]


def test_a_key_file_binds_keys_to_tenants(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nred k-red\nblue k-blue\n\nk-op\n")
    made = settle(api_key_file=str(file)).config.gateway_settings()
    assert (made.api_key, made.tenants) == ("k-op", {"k-red": "red", "k-blue": "blue"})
    for wrong in ("a b c", "a k\nb k", "k1\nk2", ""):
        file.write_text(wrong)
        with pytest.raises(ConfigError, match="NAME KEY"):
            settle(api_key_file=str(file))
