"""GPT-2, its attention registry, heads and generation."""
