"""Checkpoints of other projects, as a config and tensors under Hugging Face's names: read whole or not at all."""
