"""Data: from raw rows to packed batches, and the pond."""
