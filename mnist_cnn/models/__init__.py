"""Networks from a plain specification, and their checkpoints."""
