"""Real data on its way to the model: shards, streams, mixing, packing."""
