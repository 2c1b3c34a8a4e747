"""How many tokens a step of a launched vLLM server takes, which vLLM is told once, at its start."""

from __future__ import annotations

from typing import NamedTuple

from tidegate.costs.profile import Profile
from tidegate.fleet.vllm import ServeArguments
from tidegate.policies.chunks import budget_for


class StepChoice(NamedTuple):
    """``--max-num-batched-tokens`` of a server, and why. ``tokens`` is 0 where nobody knows it: it is vLLM's
    default. Only what is ``chosen`` has to be said to the server: the user's own words do that. ``fits``:
    no step is longer than the target for all that the profile says."""

    tokens: int
    reason: str
    chosen: bool = False
    fits: bool = True

    def __str__(self) -> str:
        budget = f"{self.tokens} tokens" if self.tokens else "vLLM's default"
        return f"{budget}, {self.reason}"


def choose_step(
    arguments: ServeArguments, profile: Profile | None, tpot_s: float | None, *, on_gpus: bool
) -> StepChoice:
    """Return the budget of a server's steps: that of the user's ``arguments``, else the one with which full
    steps keep the target ``tpot_s`` by ``profile``; never less than a step may have requests."""
    if arguments.step_tokens:
        return StepChoice(arguments.step_tokens, "as the vLLM arguments say")
    if arguments.configured:
        return StepChoice(0, "for a file of vLLM arguments may say otherwise")
    if not arguments.chunked:
        return StepChoice(0, "for steps take whole prompts")
    if profile is None or tpot_s is None:
        return StepChoice(0, "for no --profile says what steps take")
    if not on_gpus:
        return StepChoice(0, "for vLLM on CPUs ends on seeded prompts that a step splits")
    found = budget_for(profile.mixed, tpot_s)
    if found.tokens < arguments.most_sequences:
        return StepChoice(arguments.most_sequences, "the least that --max-num-seqs allows", True, False)
    target = f"{1000 * tpot_s:g} ms"
    if not found.fits:
        return StepChoice(
            found.tokens, f"the least, which takes more than {target} by {profile.name}", True, False
        )
    reason = f"a step of {target} at most by {profile.name} with {found.decodes} usual decodes in it"
    return StepChoice(found.tokens, reason, True)
