"""What a process runs in."""
