"""Metrics: pure NumPy functions of predictions and labels, one file per task.

Functions of one item (a question, a query, an object track) are what `evaluation.bootstrap`
resamples: the value of a metric is their mean. Functions of all items at once, and the tables of
`qvhighlights`, `detection` and `grounded_qa`, equal the benchmarks' own programs (docs/metrics.md).
"""
