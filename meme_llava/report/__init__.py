"""Pages to look at: data checks, experiments."""
