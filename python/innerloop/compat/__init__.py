"""Other libraries' names over innerloop: each module is imported by itself, none of them by ``import innerloop``."""
