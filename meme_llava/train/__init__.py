"""One training run, from settings to an adapter."""
