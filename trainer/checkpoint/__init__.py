"""One checkpoint format for every backend: sharded safetensors and JSON, committed by a rename, verified before it is read."""
