"""Masks of the objects in the images: where they come from, which are good enough, how they lie on disk."""
