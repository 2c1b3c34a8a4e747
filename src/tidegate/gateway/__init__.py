"""The wall-time driver: an OpenAI-compatible front over a fleet of instances."""
