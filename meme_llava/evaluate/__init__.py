"""What answers are worth: scores, the judge, result folders."""
