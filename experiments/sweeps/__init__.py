"""A sweep: which runs a config file asks for, how far each is, and what came out."""
