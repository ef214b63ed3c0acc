"""Models as bricks (arXiv 2409.02877): neurons, abilities, experts that a dense feed-forward is cut into."""
