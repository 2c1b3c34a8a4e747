"""AMPD (arXiv 2602.14516): where each round of a conversation is prefilled, and in which order.

``routing.py`` is its Algorithm 1 as published, ``reorder.py`` its Algorithm 2; ``cost_routing.py`` is ours.
``fixed.py`` has what it is compared with.
"""
