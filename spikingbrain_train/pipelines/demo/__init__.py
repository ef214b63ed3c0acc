"""What `make demo` has beside the steps of every pipeline: a model, stages fitted to a machine, a report."""
