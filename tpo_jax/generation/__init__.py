"""How the model answers: KV-cached sampler, routing to heads, preference pairs, reference sidecar."""
