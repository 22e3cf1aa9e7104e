"""What a run keeps off its device without DeepSpeed: frozen weights, and the optimizer's state."""
