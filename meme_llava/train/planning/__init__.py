"""What a run would take, in memory and time."""
