"""ARES: decodes are placed, and placed again while they run, by what they hold and will hold.

``published`` is the paper's round (arXiv 2510.13668), whose objective is the variance of loads. ``avoiding``
(ours) moves to avoid SLO damage in seconds, as ``damage`` counts it; ``consolidation`` (ours) empties
instances that a low load does not need. ``loads`` is what all look at: every instance's KV over the tokens
to come.
"""
