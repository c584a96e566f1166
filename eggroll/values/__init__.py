"""Values that stand for a perturbed array without ever building it."""
