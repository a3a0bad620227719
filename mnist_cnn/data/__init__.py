"""MNIST and its like as batches of uint8."""
