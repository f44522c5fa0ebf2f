"""Building blocks of the networks of all stages: attention, residual block, embeddings, and the Conditioning record."""
