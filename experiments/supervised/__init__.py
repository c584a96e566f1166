"""Training classifiers of real digits: `eggroll supervised`."""
