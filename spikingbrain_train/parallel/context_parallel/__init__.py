"""Sequences split over ranks in contiguous slices, and how each kind of mixer works across them.

Read :mod:`~spikingbrain_train.parallel.context_parallel.sequence_layout` first: it says who holds what.
"""
