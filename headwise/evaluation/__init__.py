"""What a model answers, how well, and whether another one does better."""
