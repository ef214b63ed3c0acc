"""What a person sees of a command while it runs. Imports neither torch nor any other room."""
