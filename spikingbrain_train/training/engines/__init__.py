"""Who shards, reduces and updates: megatron-core's data parallelism and optimizer, or DeepSpeed's ZeRO."""
