"""Flags that several verbs have: of a ``WorkloadChoice``, by field, and of scoring and output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from tidegate.cli.options import SHARE, Flag
from tidegate.core.slo import parse_slo_classes
from tidegate.measure.attainment import DEFAULT_LEVEL
from tidegate.workloads.choice import DEFAULT_INPUT, DEFAULT_OUTPUT

FORMATS = (
    "Mooncake or Bailian JSONL, Azure, BurstGPT, Vidur, Splitwise or tidegate CSV, a gateway journal or a "
    "bench result, plain or gzipped; or sample:NAME, or made: like:NAME (trace make --likes)"
)
"""The traces that tidegate reads."""

ARRIVALS = {
    "poisson": Flag("Poisson arrivals.", "RPS"),
    "gamma": Flag("Gamma-distributed gaps; see --cv.", "RPS"),
    "cv": Flag("Coefficient of variation of --gamma (1).", "X"),
    "bursts": Flag("Phases of Poisson traffic in a cycle.", "RPS:S,.."),
}
LENGTHS = {
    "input_tokens": Flag(
        f"Prompt length: N, uniform:LOW:HIGH or lognormal:MEAN:CV ({DEFAULT_INPUT}).", "N|DIST"
    ),
    "output_tokens": Flag(f"Answer length, likewise ({DEFAULT_OUTPUT}).", "N|DIST"),
    "lengths_from": Flag("Draw pairs of lengths from this trace instead.", "FILE"),
}
COLUMNS_HELP = (
    "The columns of a trace of any other format, also session, turn, delay, client, slo_class, hash_ids, "
    "block_tokens; arrival_ms and delay_ms in milliseconds."
)
COLUMNS = {"columns": Flag(COLUMNS_HELP, "arrival=C,input=C,output=C")}
TURN_GAP = {
    "turn_gap_s": Flag("Pause between turns of a session, for traces that have none.", "S", "--turn-gap")
}
JOIN_BLOCKS = {
    "join_blocks": Flag("Join prefix blocks to ones of N tokens: long histories take less time.", "N")
}
SCALE_RATE = {"scale_rate": Flag("Divide times by X: bursts get denser, too.", "X")}
SCALE_TOKENS = {"scale_tokens": Flag("Multiply lengths by X.", "X")}
WINDOW = {
    "start_s": Flag("Skip the first S seconds.", "S", "--start"),
    "duration_s": Flag("Only the arrivals of S seconds.", "S", "--duration"),
    "limit": Flag("Only the first N requests.", "N"),
}

SLO_CLASS = Flag(
    "Targets of a class that the trace names; others have those of --slo. Repeat.",
    "CLASS=ttft:MS,tpot:MS",
    "--slo-class",
    given=list[str],
    read=parse_slo_classes,
    shown=False,
)

CHUNKS_HELP = (
    "How much of prompts a step carries beside decodes: fixed (the engine's limit) or slack (what keeps "
    "every decode in time); by default the system's own."
)

SCORING = "Scoring and output"
"""The panel of the help that these options stand in."""
JOBS = Flag("Processes; default: one per core.", "N", panel=SCORING, more={"min": 1})
AS_JSON = Flag("Print the report as JSON.", name="--json", panel=SCORING)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a run is scored: ``level`` is the share of requests that have to attain their targets."""

    panel: ClassVar[str] = SCORING

    level: Annotated[float, Flag("Attainment that counts as met.", rule=SHARE)] = DEFAULT_LEVEL
    require_level: Annotated[bool, Flag("Exit 1 when missed.")] = False
    as_json: Annotated[bool, AS_JSON] = False
