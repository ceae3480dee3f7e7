"""What one forward and one backward pass say of every head, without labels: I-SAL and CAF (RAH-LoRA)."""
