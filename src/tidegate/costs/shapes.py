"""The architectures of the models that packaged profiles are of, from their config.json."""

from __future__ import annotations

from tidegate.costs.roofline import Shape

SHAPES = {
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 128, 14336, 128256, 2.0, 2.0),
    "llama-3.1-70b": Shape(8192, 80, 64, 8, 128, 28672, 128256, 2.0, 2.0),
    "llama-3.1-70b-fp8": Shape(8192, 80, 64, 8, 128, 28672, 128256, 1.0, 2.0),
    "qwen3-32b": Shape(5120, 64, 64, 8, 128, 25600, 151936, 2.0, 2.0),
    "qwen3-30b-a3b": Shape(2048, 48, 32, 4, 128, 768, 151936, 2.0, 2.0, 128, 8),
    "qwen3-235b-a22b": Shape(4096, 94, 64, 4, 128, 1536, 151936, 2.0, 2.0, 128, 8),
}
