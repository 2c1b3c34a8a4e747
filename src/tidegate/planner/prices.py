"""What a GPU costs where nobody says: dollars per GPU and hour."""

from __future__ import annotations

PRICES_PER_H = {
    "a100_sxm": 1.8,
    "b200_sxm": 5.5,
    "h100_pcie": 2.4,
    "h100_sxm": 2.8,
    "h200_sxm": 3.6,
    "h20_sxm": 1.5,
    "l4": 0.7,
    "l40s": 1.1,
    "rtx_4090": 0.5,
    "rtx_pro_6000": 1.6,
}
"""Assumed: round figures of the size that rental by the hour has, no quotation. ``--price`` replaces them."""
