"""Long-context probes that need no data set: what is hidden in a text is asked for at its end."""
