"""What a run will hold in memory and how long a step takes, before any weight is loaded."""
