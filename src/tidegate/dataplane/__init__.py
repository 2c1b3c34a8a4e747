"""The simulated data plane: engines that batch and page like vLLM, and the links between them.

The simulator runs it in virtual time, the emulated engine on the wall clock.
"""
