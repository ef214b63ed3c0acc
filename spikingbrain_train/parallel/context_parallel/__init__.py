"""Sequences split over ranks in contiguous slices, and how each kind of mixer works across them.

Read :mod:`~spikingbrain_train.architecture.sequence_layout` first: it says who holds what.
"""
