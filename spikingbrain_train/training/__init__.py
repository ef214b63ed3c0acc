"""The loop, optimizer and schedules, checkpoints, metrics and recovery."""
