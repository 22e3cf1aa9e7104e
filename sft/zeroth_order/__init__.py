"""Training by forward passes alone."""
