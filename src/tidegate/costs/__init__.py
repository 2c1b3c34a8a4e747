"""Latency models in seconds, their fitting, and instance profiles."""
