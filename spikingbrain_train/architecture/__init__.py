"""What a layer can be, torch-free: one description per kind of mixer, feed-forward and linear transform."""
