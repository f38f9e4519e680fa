"""What happens while a job trains: measuring, following the plan with the clocks, giving them back."""
