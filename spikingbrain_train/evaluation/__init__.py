"""How good a model is: held-out cross entropy in training, perplexity and samples of exported folders."""
