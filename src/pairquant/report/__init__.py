"""One HTML page, and figures, of what finished checkpoints hold."""
