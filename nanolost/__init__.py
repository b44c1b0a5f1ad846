"""What the commands share, one thing a room."""
