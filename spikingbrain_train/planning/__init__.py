"""What a run will take, and whether it can work, before torch is imported: parameters, memory, layouts."""
