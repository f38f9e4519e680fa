"""The steps of the measurement, a file each; `step_list` has them in order."""
