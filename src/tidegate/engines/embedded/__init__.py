"""A small real engine on PyTorch: continuous batching, paged KV, KV transfer between processes."""
