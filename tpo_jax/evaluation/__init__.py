"""How good a model is: metrics, benchmarks, floors, intervals and the report."""
