"""One job from recipe to exported model."""
