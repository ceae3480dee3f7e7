"""What every head of the decoder attends to: read while the model computes its own output, reduced row block by row block."""
