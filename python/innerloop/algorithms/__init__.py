"""The built-in algorithms: one paper, one file, found through the same entry points as everybody else's."""
