"""The search of a layout for a model and a cluster: what can be tried, what fits, what is fastest."""
