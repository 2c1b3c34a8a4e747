"""Instances without tensors: vLLM's dialect over HTTP, timed by simulated instances on the wall clock."""
