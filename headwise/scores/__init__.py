"""What every head scores, from the stored attention and the masks alone: no model is loaded here."""
