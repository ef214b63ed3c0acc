"""Which documents make a sample, where samples are not cut from the tokens as they lie on disk."""
