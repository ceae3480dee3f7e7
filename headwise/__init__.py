"""Headwise: find the attention heads that look where the question points, and recalibrate a vision-language model through them."""
