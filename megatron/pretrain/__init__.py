"""NEO: pre-training from raw text to a Hugging Face model, on megatron-core."""

__version__ = "0.1.0"
