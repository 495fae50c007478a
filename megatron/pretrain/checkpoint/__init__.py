"""Checkpoints in megatron-core's torch_dist format, each with a manifest of how it was made."""
