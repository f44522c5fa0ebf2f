"""What the networks of all stages are built from: attention, residual block, embeddings, and the Conditioning record."""
