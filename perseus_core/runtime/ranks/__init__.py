"""What the ranks of a job tell each other, and what rank 0 concludes for all of them."""
