"""What is taken where nothing else is named, for the library, commands and experiments alike."""

DEFAULT_SYSTEM = "tidegate"
"""Who decides (docs/decisions/0017-tidegate-is-the-default.md)."""
