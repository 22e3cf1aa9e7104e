"""What a run leaves to look at: its log, its page, its plots."""
