"""What looks at adapters, compares, composes and checks them; base weights stay on disk."""
