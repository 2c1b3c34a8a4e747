"""Nouns and rules: requests, instances, snapshots, decisions, clocks, errors. No I/O."""
