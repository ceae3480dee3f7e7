"""Official files in miniature, written as their authors write them."""
