"""This project's kernels inside other people's models."""
