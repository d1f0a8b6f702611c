"""The trunk and what it is made of. Knows nothing of objectives, data or sampling loops."""
