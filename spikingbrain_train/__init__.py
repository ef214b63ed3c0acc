"""Distributed training for SpikingBrain-style hybrid linear-attention language models."""

__version__ = "0.1.0"
