"""What of a model's feed-forwards is zero: counted on text, with thresholds that are tried, reported."""
