"""Fewer weights, neurons, heads and layers: what to take out of a model, and what keeps it out."""
