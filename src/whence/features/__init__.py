"""From an image to a row of numbers: gradients, projections, activations, embeddings."""
