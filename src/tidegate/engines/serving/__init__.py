"""vLLM's dialect over HTTP in front of one engine: what the embedded and the emulated engine share."""
