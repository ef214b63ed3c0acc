"""Stage after stage from one YAML file: each step is a command that a user could type."""
