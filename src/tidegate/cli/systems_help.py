"""What ``--system`` picks, in words; importing the systems themselves would slow every command down."""

from __future__ import annotations

SYSTEMS_HELP = (
    "The composition of policies that decides: "
    "always-local (later rounds where they decode), "
    "always-remote (every prefill remote, history computed again), "
    "always-remote-return (every prefill remote, history read over), "
    "ampd (rounds go where there is slack, queues are reordered), "
    "ampd-cost (rounds go where they cost least), "
    "ares (static split, running decodes move to where they vary least), "
    "ares-slo (static split, running decodes move where that avoids SLO damage), "
    "ares-slo+consolidate (ares-slo, and decode instances that a low load does not need are emptied), "
    "arrow (Arrow as published, version 2), "
    "arrow+ares (role flips, and running decodes move where that avoids SLO damage), "
    "arrow-lending (SLO-aware placement with role flips), "
    "arrow-v1 (four elastic pools), "
    "colocated (both phases on one instance), "
    "colocated-sticky (both phases on one instance, sessions stay), "
    "minimal-load (static split, least predicted time first), "
    "ppd (later rounds appended by a table), "
    "round-robin (static split, each pool in turn) "
    "or static (static split, fewest tokens first); with embedded engines any of them as NAME+ORDER, where "
    "waiting prefills are served by fifo, edf (earliest deadline), sjf (shortest), feasible-first (earliest "
    "deadline that can still be met), reorder (the first three by what is in time) or slack (the first 64 "
    "likewise), as in arrow-lending+feasible-first. In front of vLLM servers the default is static unless "
    "there is a --profile of them, which the others but round-robin need."
)
