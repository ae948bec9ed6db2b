"""generate(): prefill, decoding steps, sampling, beams, streaming."""
