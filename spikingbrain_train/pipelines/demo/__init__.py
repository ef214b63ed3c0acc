"""The whole road in one command (`make demo`): each step is a command that a user could type."""
