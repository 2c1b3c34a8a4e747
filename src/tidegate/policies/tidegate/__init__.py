"""The policies of the system ``tidegate`` (ours).

``placement.py`` places both phases by one cost in seconds (``cost.py``); ``labels.py`` says which instances
only prefill, by what the fleet serves then (``shape.py``).
"""
