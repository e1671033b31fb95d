"""The LLaVA: names, packed attention, loss, what is trainable."""
