"""The machine as it is: platform, packages, number formats, every patch of torch and megatron-core."""
