"""Write With Transformer, locally: `python -m model.write` serves one page where Tab offers three continuations."""
