"""The errors with which requests end that a policy, or a fleet without instances, refuses."""

from __future__ import annotations

from tidegate.core.decision import Hold, Place, Placement, Reject
from tidegate.core.errors import NoInstance, Overloaded


def rejected(reject: Reject) -> Overloaded:
    """Return what a policy said."""
    return Overloaded(reject.reason, retry_after_s=reject.retry_after_s)


def held_too_long(hold: Hold, retry_after_s: float) -> Overloaded:
    """Return the error of a request that was held as long as it may take."""
    return Overloaded(f"held until its deadline: {hold.reason}", retry_after_s=retry_after_s)


def no_decode(decision: Placement, retry_after_s: float) -> Overloaded:
    """Return the error of a request whose decode placement gave no instance."""
    match decision:
        case Reject():
            return rejected(decision)
        case Hold():
            reason = f"a decode cannot be held, its first token is out: {decision.reason}"
        case Place():
            reason = "the decode placement named no instance"
    return Overloaded(reason, retry_after_s=retry_after_s)


def none_up(retry_after_s: float) -> NoInstance:
    """Return the error of a request that found no instance."""
    return NoInstance("no instance is up", retry_after_s=retry_after_s)
