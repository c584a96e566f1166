"""Models that the drivers train: plain functions or Flax modules that know nothing of the training."""
