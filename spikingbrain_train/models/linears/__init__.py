"""The linears of a model: whose classes they are, and what is done to their inputs and weights."""
