"""`python -m innerloop` is the `innerloop` command."""

from innerloop.cli import main

main()
