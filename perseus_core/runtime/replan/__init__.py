"""Rank 0: from the measurements of all ranks to the plan that runs."""
