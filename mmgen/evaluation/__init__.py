"""What a trained model is worth: features, distances, alignment, memorization, and the protocol over a run."""
