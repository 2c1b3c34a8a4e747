"""The engine seam and its adapters."""
