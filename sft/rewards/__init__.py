"""What completions are rewarded for, while a model learns by rewards."""
