"""What a student writes beside what its teacher writes: a model close by likelihood may be far off here."""
