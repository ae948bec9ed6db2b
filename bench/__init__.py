"""Benchmarks: each is a command."""
