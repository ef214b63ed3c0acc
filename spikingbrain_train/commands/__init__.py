"""What a user types: the table of commands, and how each of them starts."""
