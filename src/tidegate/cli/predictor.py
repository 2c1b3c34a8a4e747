"""``tidegate predictor``: learn how many tokens a request still has to go."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from msgspec.json import encode as encode_json
from msgspec.json import format as format_json

from tidegate.cli.model import require_embedded
from tidegate.cli.options import Flag, OptionGroup, at_least, epilog, expanded
from tidegate.cli.terminal import note, plain_table
from tidegate.core.errors import ConfigError
from tidegate.predictor.settings import TrainingSettings

COLLECT_EXAMPLES = """
    tidegate predictor collect --model models/smollm2 --out collected --requests 2000
"""
TRAIN_EXAMPLES = """
    tidegate predictor train --data collected --out head.safetensors --name SmolLM2-135M-Instruct
"""
EVAL_EXAMPLES = """
    tidegate predictor eval --data collected --head head.safetensors --json errors.json

    tidegate predictor eval --data collected --head head.safetensors --model models/smollm2 --encoder minilm
"""
TRAINING = {
    "dropout": Flag("Share of inputs that each layer does without while it learns."),
    "input_dropout": Flag("The same for the first layer's, of the hidden state."),
    "weight_decay": Flag("Weight decay of AdamW."),
    "learning_rate": Flag("Learning rate of AdamW."),
    "epochs": Flag("Passes over the samples at most.", rule=at_least(1)),
    "seed": Flag("Seed of the first weights and of the order."),
}


def collect(
    model: Annotated[Path, Flag("Model folder in the Hugging Face layout.", metavar="DIR")],
    out: Annotated[Path, Flag("Folder of the samples; a collection in it is continued.", metavar="DIR")],
    requests: Annotated[int, Flag("Prompts to answer.", rule=at_least(1))] = 2000,
    batch: Annotated[int, Flag("Requests that run at once.", rule=at_least(1))] = 32,
    minutes: Annotated[float, Flag("Begin no request after so long.")] = 24 * 60,
    seed: Annotated[int, Flag("Seed of prompts and sampling.")] = 0,
    every: Annotated[int, Flag("Tokens between two samples of a request.", rule=at_least(1))] = 20,
    max_tokens: Annotated[int, Flag("Longest answer, in tokens.", rule=at_least(1))] = 1024,
    dtype: Annotated[str, Flag("Dtype of the model.")] = "auto",
) -> None:
    """Answer generated prompts and keep hidden states along the answers.

    Runs the embedded engine in this process. Stop it when you like: the same command goes on where it was.
    """
    require_embedded()
    from tidegate.predictor.collect import Collector, settings_for

    settings = settings_for(model, seed=seed, every=every, max_tokens=max_tokens, dtype=dtype)
    collector = Collector(model, out, requests=requests, batch=batch, settings=settings)
    have = collector.run(note, minutes * 60)
    typer.echo(f"{out} has {have} requests")


def train(
    data: Annotated[Path, Flag("Folder that `collect` wrote.", metavar="DIR")],
    out: Annotated[Path, Flag("File of the head; its card is written beside it.", metavar="FILE")],
    settings: Annotated[TrainingSettings, OptionGroup(TrainingSettings, TRAINING, "Training")],
    name: Annotated[str, Flag("What the card calls the model.")] = "the model",
) -> None:
    """Train a head on collected hidden states.

    Splits by request, stops when the validation error no longer falls, and
    reports the errors on requests that it has not seen.
    """
    require_embedded()
    from tidegate.predictor.card import mae_table
    from tidegate.predictor.compare import train as train_and_save

    _show(mae_table([train_and_save(data, out, name, settings)]))
    typer.echo(f"\nwrote {out} and {out.with_suffix('.md')}; serve with it: --predictor {out}")


def evaluate(
    data: Annotated[Path, Flag("Folder that `collect` wrote.", metavar="DIR")],
    head: Annotated[Path, Flag("File of the head.", metavar="FILE")],
    encoder: Annotated[Path | None, Flag("Folder of a sentence encoder to compare with.", "DIR")] = None,
    model: Annotated[Path | None, Flag("Folder of the model, whose tokens it reads as text.", "DIR")] = None,
    fine_tune: Annotated[bool, Flag("Train the encoder, too.")] = False,
    json: Annotated[Path | None, Flag("Write the figures here.", "FILE")] = None,
    errors: Annotated[Path | None, Flag("Write each prediction and what was true here.", "FILE")] = None,
    error_model: Annotated[Path | None, Flag("Write how it errs, for simulations, here.", "FILE")] = None,
) -> None:
    """Compare a head with other predictors on requests that none has seen.

    Mean absolute errors in tokens, by how many were generated, with 95 %
    intervals of a bootstrap over requests.
    """
    require_embedded()
    from tidegate.engines.embedded.length_head import load_head
    from tidegate.predictor.card import mae_table
    from tidegate.predictor.compare import Rival, compare
    from tidegate.predictor.dataset import read_settings
    from tidegate.predictor.evaluate import write_errors

    if encoder is not None and model is None:
        raise ConfigError("--encoder needs --model, whose tokens it reads as text")
    loaded, facts = load_head(head)
    collected = read_settings(data)
    if facts.model_hash != collected.model_hash:
        raise ConfigError(
            f"{head} was trained for the model with hash {facts.model_hash}; {data} is of the one with "
            f"{collected.model_hash}"
        )
    rival = None if encoder is None or model is None else Rival(encoder, model, fine_tune)
    found = compare(data, loaded, facts, TrainingSettings(), rival, note)
    _show(mae_table(found.report["predictors"]))
    for each in found.report["reductions"]:
        mae = each["mae"]
        fewer = each["parameters"]
        typer.echo(
            f"{each['of']} is off by {mae['value']:.2%} less than {each['below']} "
            f"({mae['low']:.2%} to {mae['high']:.2%})"
            + (f", with {fewer:.2%} fewer parameters" if fewer and fewer > 0 else "")
        )
    if json is not None:
        json.write_text(dumps(found.report, indent=2) + "\n")
    if errors is not None:
        write_errors(errors, found.errors)
    if error_model is not None:
        error_model.write_bytes(format_json(encode_json(found.error_model), indent=2) + b"\n")


def _show(rows: list[list[str]]) -> None:
    from rich.console import Console

    table = plain_table()
    for name in rows[0]:
        table.add_column(name, justify="left" if name == rows[0][0] else "right")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


verbs = typer.Typer(no_args_is_help=True, epilog=epilog(COLLECT_EXAMPLES + TRAIN_EXAMPLES + EVAL_EXAMPLES))
verbs.command("collect", epilog=epilog(COLLECT_EXAMPLES))(expanded(collect))
verbs.command("train", epilog=epilog(TRAIN_EXAMPLES))(expanded(train))
verbs.command("eval", epilog=epilog(EVAL_EXAMPLES))(expanded(evaluate))
