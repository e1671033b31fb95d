"""The way from an annotation to a packed batch."""
