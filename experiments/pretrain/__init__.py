"""Pretraining small language models on bytes, in integers or floats: `eggroll pretrain`."""
