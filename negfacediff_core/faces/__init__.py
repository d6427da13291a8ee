"""From images to aligned crops and embeddings: detect, align, embed, and the demo pack's detector."""
