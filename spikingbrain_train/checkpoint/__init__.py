"""Checkpoints: written by all ranks, verified, made the newest, pruned, and read again at any topology.

- saving: write -> verify -> commit, beside the training loop (host_copies, background) or waited for
- loading: a run that goes on, or weights alone
- sharded_state, optimizer_state: what of a run is written, and where it goes when it is read
- torch_dist: the shards themselves, in megatron-core's format; streaming: the same format without ranks
- verification: files are what was saved; finite_state: numbers are numbers; failures: ranks fail together
- retention: which checkpoints stay; run_checkpoints: all of this for one run's output_dir

Where files lie and what a manifest is stands in the room storage, which needs no torch.
"""
