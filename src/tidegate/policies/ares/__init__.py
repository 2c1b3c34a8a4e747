"""ARES: decodes are placed, and placed again while they run, by what they hold and will hold.

``published`` is the paper's round (arXiv 2510.13668) with the variance of loads as its objective. ``loads`` is
what both look at: every instance's KV over the tokens to come.
"""
