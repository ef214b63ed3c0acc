"""What every kind of stage is, without torch: one file a kind, and the registry that knows them all."""
