"""Weights to and from the formats of Hugging Face."""
