"""What holds the parameters, gradients and optimizer state of a run: plain torch, or a sharder."""
