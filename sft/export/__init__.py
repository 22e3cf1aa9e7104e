"""What a trained model is saved as."""
