"""Suites: named rows of experiments, run and judged together."""
