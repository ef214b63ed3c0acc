"""Which layers keep softmax attention: each swap alone, measured on held-out text."""
