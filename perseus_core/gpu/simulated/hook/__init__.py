"""A folder for PYTHONPATH; see `sitecustomize.py`. Nothing imports it."""
