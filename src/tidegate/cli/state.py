"""``tidegate state``: what a running gateway knows, as a table."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from tidegate.cli.options import Flag
from tidegate.core.errors import SetupError, TidegateError

TIMEOUT_S = 5.0

EPILOG = """
[bold]Examples[/bold]

    tidegate state

    tidegate state --url http://10.0.0.5:8000 --json | jq '.instances\\[].role'
"""


def run(
    url: Annotated[str, Flag("The gateway.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str, Flag("Its API key.", "KEY", shown=False, more={"envvar": "TIDEGATE_API_KEY"})
    ] = "",
    as_json: Annotated[bool, Flag("Print what the gateway answered, as JSON.", name="--json")] = False,
) -> None:
    """Show the instances of a running gateway: their roles, their work and their last flips."""
    answer = _ask(url.rstrip("/").removesuffix("/v1"), api_key)
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        from tidegate.cli.tables import show_state

        show_state(answer)


def _ask(base_url: str, api_key: str) -> dict[str, Any]:
    """Fetch the state. Raises SetupError when the address or key is wrong, TidegateError when it fails."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(f"{base_url}/tidegate/state", headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 401:
                raise SetupError(f"{base_url} wants an API key: --api-key or TIDEGATE_API_KEY") from None
            if error.code == 404:
                raise SetupError(f"{base_url} is not a tidegate gateway") from None
            raise TidegateError(f"{base_url} answered {error.code} {error.reason}") from None
    except json.JSONDecodeError:
        raise SetupError(f"{base_url} is not a tidegate gateway") from None
    except ValueError as error:
        raise SetupError(f"{base_url!r} is not a URL: {error}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise TidegateError(f"no gateway answers at {base_url}: {reason}") from None
    if not isinstance(answer, dict):
        raise SetupError(f"{base_url} is not a tidegate gateway")
    return answer
