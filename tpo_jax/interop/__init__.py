"""How it talks to the outside: model folders, and one weight mapping per family, both ways."""
