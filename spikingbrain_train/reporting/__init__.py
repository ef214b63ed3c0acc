"""What a person sees of commands and runs: progress, metrics read back, pictures of them. Without torch."""
