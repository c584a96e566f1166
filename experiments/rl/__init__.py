"""Training policies in gymnax environments: `eggroll rl`."""
