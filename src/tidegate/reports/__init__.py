"""Runs, comparisons and recordings as text, tables, charts and pages."""
