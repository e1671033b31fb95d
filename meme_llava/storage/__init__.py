"""Files written whole, hashes, run records, hub folders, tensors in files."""
