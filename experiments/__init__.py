"""The drivers: real training runs on top of `eggroll`, reached through the command line `eggroll`."""
