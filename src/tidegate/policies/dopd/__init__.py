"""DOPD (arXiv 2511.20982): an optimal ratio of prefill and decode instances."""
