"""Examples: read, recognised, encoded."""
