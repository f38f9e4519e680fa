"""The commands of the `perseus` program, one module each: `add_arguments` declares them, `run` executes them."""
