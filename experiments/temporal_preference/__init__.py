"""Studies of Temporal Preference Optimization on long videos, from the shipped base model."""
