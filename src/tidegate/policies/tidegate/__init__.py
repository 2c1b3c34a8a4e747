"""The policies of the system ``tidegate`` (ours): one cost in seconds for every place of a request, and labels
that follow the arithmetic of what comes.
"""
