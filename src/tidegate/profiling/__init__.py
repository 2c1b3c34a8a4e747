"""Measures live instances for ``tidegate profile``: their steps, and the links between them."""
