"""The control plane, sans I/O."""
