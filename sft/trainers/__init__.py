"""Trainers of TRL and transformers with our training."""
