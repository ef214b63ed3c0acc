"""Who shards, reduces and updates: megatron-core, DeepSpeed's ZeRO, or torch's FSDP2."""
