"""What spikes are and how they are counted; the encoding itself is ops/spike_encoding.py."""
