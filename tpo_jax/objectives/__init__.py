"""What is minimised: pure functions that return `WeightedSum(total, weight)` per term."""
