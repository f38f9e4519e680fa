"""The name of our block in a DeepSpeed config."""

BLOCK = "perseus"
