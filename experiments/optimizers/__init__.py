"""Comparing optimizers by backpropagation: `eggroll optimizers` and `eggroll study`."""
