"""The card of a trained head: what it was made from, and how far it is off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tidegate.engines.embedded.length_head import HeadFacts
from tidegate.predictor.dataset import CollectionSettings, Samples, Split
from tidegate.predictor.evaluate import PROGRESS
from tidegate.predictor.settings import TrainingSettings


def progress_label(begin: int) -> str:
    """Return how a row of the table is called that begins at ``begin`` generated tokens."""
    end = next((value for value in PROGRESS if value > begin), None)
    if begin == 0:
        return "prompt's end"
    return f"{begin} and more" if end is None else f"{begin} to {end - 1}"


def mae_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table of mean absolute errors in tokens, with 95 % intervals; its first row names columns.
    ``rows`` are of ``Evaluation.row``."""
    table = [["tokens generated", "samples", *(row["name"] for row in rows)]]
    for at, cell in enumerate(rows[0]["by_progress"]):
        cells = [_cell(row["by_progress"][at]) for row in rows]
        table.append([progress_label(cell["from_tokens"]), str(cell["samples"]), *cells])
    table.append(["all", str(rows[0]["samples"]), *(_cell(row["mae"]) for row in rows)])
    table.append(["parameters", "", *(f"{row['parameters']:,}" for row in rows)])
    return table


def _cell(figure: dict[str, Any]) -> str:
    return f"{figure['value']:.1f} ({figure['low']:.1f} to {figure['high']:.1f})"


def card(
    name: str,
    facts: HeadFacts,
    samples: Samples,
    split: Split,
    collected: CollectionSettings,
    training: TrainingSettings,
    row: dict[str, Any],
) -> str:
    """Return the card in Markdown; ``row`` has the head's errors on the held-out requests."""
    lengths = samples.output_tokens
    table = mae_table([row])
    lines = [" | ".join(cells) for cells in table]
    return f"""# Length head for {name}

A multilayer perceptron that reads from a hidden state of the model how many tokens of an answer are left.

- Base model: {name}, hash `{facts.model_hash}`.
  The head is refused for any other.
- Input: what the last layer gives for the newest token, behind the final norm, {facts.widths[0]} wide.
  Beside it, how many tokens were generated.
- Output: the share of the tokens up to {facts.horizon} that follow that token, the end of sequence included.
- Layers: {"-".join(map(str, facts.widths))}, ReLU; {row["parameters"]:,} parameters.
  One prediction every {facts.every} tokens, the first at the prompt's end; each is blended with
  what is left of those before it.
- Data: {len(lengths)} answers of the model itself ({int(lengths.sum()):,} tokens,
  {len(samples.request):,} samples) in dtype {collected.dtype} to generated prompts of seed {collected.seed},
  sampled at temperatures from {collected.least_temperature} to {collected.most_temperature}.
  Half of the answers have at most {int(np.median(lengths))} tokens.
- Answers end by themselves or at {collected.max_tokens} tokens ({samples.cut.mean():.0%} of them).
  What is left counts up to there, so the head knows nothing of longer answers.
- Split by request: {len(split.train)} to learn from, {len(split.validation)} to stop by,
  {len(split.test)} held out.
- Training: least absolute error of logarithms, AdamW at {training.learning_rate:g}, weight decay
  {training.weight_decay:g}, dropout {training.dropout:g}, of the input {training.input_dropout:g},
  at most {training.epochs} epochs, until {training.patience} in a row brought nothing; seed {training.seed}.

Mean absolute error on the held-out requests in tokens, with 95 % intervals of a bootstrap over requests:

| {lines[0]} |
|{" --- |" * len(table[0])}
{chr(10).join(f"| {line} |" for line in lines[1:])}
"""
