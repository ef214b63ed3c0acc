"""Pure functions of tensors: of each a naive reference, a form for CPUs, kernels of libraries on GPUs."""
