"""What spikes would be in front of a checkpoint's projections: counted on text, priced, reported."""
