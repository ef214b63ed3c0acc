"""Sequence mixers: drop-ins for a layer's ``self_attention``."""
