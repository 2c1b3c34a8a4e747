"""Named compositions of policies: what a user picks with ``--system``."""
