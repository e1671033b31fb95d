"""How processes start, agree and stop, and which engine shards what."""
