"""The commands of `python -m ssl_jax`."""
