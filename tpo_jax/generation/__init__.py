"""How the model answers: cached sampler, routing to heads, preference pairs, reference sidecar."""
