"""Inference: plans, loops over expand and refine, and the sampler that interleaves them. Trains nothing."""
