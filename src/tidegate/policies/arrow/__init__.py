"""Arrow: every instance runs either phase, and its label, which a flip rewrites, says which it is sent.

``published`` is version 2 of the paper (arXiv 2505.11916v2), Algorithms 1 to 3, with Narwhal's values and
readings where the paper names none.
``lending`` (ours) compares by the same costs and flips by the same Algorithm 3, but asks before a flip what
would be left of the pool that gives an instance away, and lets an instance take the other phase's work
beside its own. ``pools_v1`` is version 1, by the xLLM report. ``repair`` (ours) wraps any of them: it refills
a pool whose members died.

The systems ``arrow``, ``arrow-lending`` and ``arrow-v1`` are ``published``, ``lending`` and ``pools_v1``,
each wrapped in ``repair``. Where they depart from their sources: ``docs/policies``.
"""
