"""Task Preference Optimization on the built-in world: what its claims are worth here.

Each module but `arms`, `claims` and `page` is a study with its own command.
"""
