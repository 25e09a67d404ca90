"""Self-supervised visual pre-training in JAX."""
