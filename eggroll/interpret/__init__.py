"""Runs any traced JAX function on perturbed parameters that are never built."""
