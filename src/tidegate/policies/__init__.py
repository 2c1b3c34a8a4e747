"""Decisions, one file each: pure functions of (request, Snapshot)."""
