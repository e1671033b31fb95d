"""How downloads become annotation files."""
