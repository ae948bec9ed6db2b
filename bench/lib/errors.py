"""An error as a status, without torch."""


def in_words(error):
    """The error's type and the first line that it has."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"error: {type(error).__name__}: {lines[0][:300]}"
