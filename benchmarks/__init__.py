"""What README and docs claim, as commands: `python -m benchmarks.<name>`. Nothing of the package imports this."""
