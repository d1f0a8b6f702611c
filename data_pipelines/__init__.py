"""Raw sets -> WebDataset shards with a manifest: `python -m data_pipelines.<name>` from the repository root."""
