"""Before a run: GPUs, memory, network, clocks, disk and versions of its hosts, held against each other."""
