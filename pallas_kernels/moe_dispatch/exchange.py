"""Rows to the devices that serve them and back: an all-to-all of as many rows as each pair needs.

A device's rows stand in the order of the devices that they go to, and arrive in the order of those
that they come from, in a buffer of fixed size. What does not fit is left behind: the last rows of
the last senders. The gradient of a transfer is the transfer back.

`jax.lax.ragged_all_to_all` moves them where the platform has it. On CPUs all devices gather
everything and pick their rows: right, and as wasteful as it sounds.

Shape suffixes: G devices of the mesh axis, R rows here, S rows of the buffer, D width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import same_axes


class Plan(NamedTuple):
    """Where rows go, int32, for this device: as much as `jax.lax.ragged_all_to_all` wants to know.

    To device g go `sent_G[g]` rows from row `begin_G[g]` on, which arrive at its row `there_G[g]`;
    from it come `received_G[g]` rows, which arrive at row `here_G[g]` and were `from_G[g]` there.
    """

    begin_G: jax.Array
    sent_G: jax.Array
    there_G: jax.Array
    here_G: jax.Array
    received_G: jax.Array
    from_G: jax.Array

    def reversed(self) -> "Plan":
        return Plan(
            self.here_G, self.received_G, self.from_G, self.begin_G, self.sent_G, self.there_G
        )


def plan(counts_G: jax.Array, rows: int, axis_name: str) -> tuple[Plan, jax.Array]:
    """How rows are exchanged when this device has `counts_G[g]` for device g of `axis_name`.

    Args:
      counts_G: int `[G]`; this device's rows for g begin at the sum of the counts before.
      rows: of every device's buffer.

    Returns:
      the plan, and how many rows of this device are left behind, int32 [].
    """
    counts_GG = jax.lax.all_gather(counts_G.astype(jnp.int32), axis_name)  # from, to
    begin_GG = jnp.cumsum(counts_GG, axis=1) - counts_GG
    # In a buffer each sender has the rows after those of the senders before it, as far as it goes.
    arrive_GG = jnp.minimum(jnp.cumsum(counts_GG, axis=0) - counts_GG, rows)
    sent_GG = jnp.minimum(counts_GG, rows - arrive_GG)
    me = jax.lax.axis_index(axis_name)
    own = lambda x, axis: jax.lax.dynamic_index_in_dim(x, me, axis, keepdims=False)  # noqa: E731
    route = Plan(
        own(begin_GG, 0), own(sent_GG, 0), own(arrive_GG, 0),
        own(arrive_GG, 1), own(sent_GG, 1), own(begin_GG, 1),
    )  # fmt: skip
    return route, jnp.sum(own(counts_GG, 0) - route.sent_G)


def send(x_RD: jax.Array, route: Plan, rows: int, axis_name: str) -> jax.Array:
    """What arrives here, `[rows, D]`: by sender, each sender's in its order; then zeros."""
    return _transfer(x_RD, route, rows, axis_name)


def send_back(y_SD: jax.Array, route: Plan, rows: int, axis_name: str) -> jax.Array:
    """Rows of the buffer to where they were sent from, `[rows, D]`; zeros for those left behind."""
    return _transfer(y_SD, route.reversed(), rows, axis_name)


def _transfer(x_RD, route, rows, axis_name):
    x_RD, *route = same_axes(x_RD, *route)
    return _move(x_RD, Plan(*route), rows, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _move(x_RD, route, rows, axis_name):
    empty_SD = jnp.zeros_like(x_RD, shape=(rows, *x_RD.shape[1:]))
    return jax.lax.platform_dependent(
        x_RD,
        same_axes(empty_SD, x_RD)[0],
        route,
        cpu=functools.partial(_gathered, axis_name=axis_name),
        default=functools.partial(_ragged, axis_name=axis_name),
    )


def _forward(x_RD, route, rows, axis_name):
    return _move(x_RD, route, rows, axis_name), (route, len(x_RD))


def _backward(rows, axis_name, saved, d_y_SD):
    route, size = saved
    return _move(d_y_SD, route.reversed(), size, axis_name), None


_move.defvjp(_forward, _backward)


def _ragged(x_RD, empty_SD, route, axis_name):
    return jax.lax.ragged_all_to_all(
        x_RD, empty_SD, route.begin_G, route.sent_G, route.there_G, route.received_G,
        axis_name=axis_name,
    )  # fmt: skip


def _gathered(x_RD, empty_SD, route, axis_name):
    all_GRD = jax.lax.all_gather(x_RD, axis_name)
    row_S1 = jnp.arange(len(empty_SD))[:, None]
    from_SG = (row_S1 >= route.here_G) & (row_S1 < route.here_G + route.received_G)
    row_S = jnp.sum(jnp.where(from_SG, row_S1 - route.here_G + route.from_G, 0), axis=1)
    picked_SD = all_GRD[jnp.argmax(from_SG, axis=1), row_S]
    return jnp.where(jnp.any(from_SG, axis=1)[:, None], picked_SD, empty_SD)
