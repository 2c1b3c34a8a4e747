"""The OpenAI dialect, as vLLM speaks it: bodies in, chunks and errors out. No I/O."""
