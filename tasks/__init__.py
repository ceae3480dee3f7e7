"""The steps: one module per DVC stage; paths and frozen settings in, an immutable folder out."""
