"""Spikes by themselves: counts as trains of spikes in every coding, products over them, what they cost."""
