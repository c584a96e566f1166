"""Models the drivers train: ordinary Flax modules that know nothing of evolution strategies."""
