"""Metrics: pure NumPy functions of predictions and labels, one file per task.

Every function scores one item (a question, a query, an object track); the value of a metric is the
mean over items, which is what lets `evaluation.bootstrap` resample whole videos.
"""
