"""Placements without flips: what the adaptive policies are compared with."""
