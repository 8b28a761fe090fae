"""Preference pairs from videos without questions, in stages that each keep a manifest."""
