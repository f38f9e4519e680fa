"""Following a plan with the GPU's clock, and giving the clock back whatever happens."""
