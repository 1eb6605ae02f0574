"""The harness of the benchmarks: rivals that compute the same gradient, compared first, then timed in turns.

`innerloop bench` is its command, with the rivals that torch alone has; those of other libraries stand in the
repository's benchmarks/, which runs them by the same code. From below: workloads, rivals, worker (a rival's process),
race (comparing and timing them), machine.
"""
