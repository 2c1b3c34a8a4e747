"""The adapter for stock vLLM servers."""
