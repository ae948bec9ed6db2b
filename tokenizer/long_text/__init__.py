"""How long text is encoded fast: cut, looked up and merged in numpy, with the ids of the short path."""
