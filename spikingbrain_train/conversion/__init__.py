"""Hugging Face checkpoints to Megatron and back, with the swap of sequence mixers on the way in.

Read :mod:`~spikingbrain_train.conversion.mapping` first: what both directions follow.
"""
