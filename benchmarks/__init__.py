"""Measurements side by side in one process: what is reported is ratios, not times."""
