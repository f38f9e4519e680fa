"""What one rank measures of itself: times, energies, the sweep over the clocks, deviations from the plan."""
