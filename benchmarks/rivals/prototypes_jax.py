"""JAX: value_and_grad of the expanded form under jit, all tasks at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from head_workloads import HeadWorkload, make_embeddings
from innerloop.bench.rivals import Step


def make(workload: HeadWorkload, dtype: str, query_norms: bool) -> Step:
    jax.config.update("jax_enable_x64", dtype == "float64")
    support, _, queries, query_labels = map(jnp.asarray, make_embeddings(workload, dtype))

    def loss_of(support, queries):
        centres = support.reshape(workload.tasks, workload.shots, workload.ways, -1).mean(1)
        logits = 2 * jnp.einsum("tqd,tnd->tqn", queries, centres) - (centres**2).sum(2)[:, None]
        if query_norms:
            logits = logits - (queries**2).sum(2)[..., None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), query_labels[..., None], 2).mean()

    gradient = jax.jit(jax.value_and_grad(loss_of, (0, 1)))
    return lambda: jax.block_until_ready(gradient(support, queries))
