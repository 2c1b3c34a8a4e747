"""Simulations in numbers: one run from its settings, goodput searches, comparisons of systems."""
