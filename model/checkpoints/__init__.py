"""Checkpoints in Hugging Face's layout, both ways."""
