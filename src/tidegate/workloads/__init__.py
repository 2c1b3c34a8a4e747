"""Request traces: read, generate, transform, describe, write, and turn into prompts."""
