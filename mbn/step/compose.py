"""The composition of kernels to a step of batch normalisation, and to its pullback.

Every backend, framework and transformation uses these two functions. A backend binds both once, when it is made
(``Integration.bind``).
"""

from mbn.contract import Array, Batch, Kernels, Params, Replicas, Settings, State, Stats, merged, summed

ALL = (True, True, True)


def forward(
    kernels: Kernels,
    batch: Batch,
    params: Params,
    state: State,
    settings: Settings,
    training: bool,
    out: Array | None = None,
    keep: bool = True,
    replicas: Replicas | None = None,
) -> tuple[Array, State, Stats | None]:
    """Normalise a batch: in training by its statistics, or those of all replicas together; else by the running ones.

    Returns:
        The output, the new state, and the statistics that ``pullback`` needs; without ``keep`` they may be None.
    """
    if training:
        if kernels.train is not None and replicas is None:
            result = kernels.train(batch, params, state, settings, out)
            if result is not None:
                return result
        stats, state = kernels.advance(state, merged(kernels, kernels.moments(batch), batch.dtype, replicas), settings)
    else:
        stats = Stats(state.running_mean, state.running_var, None)
        if kernels.evaluate is not None:
            y = kernels.evaluate(batch, params, state, settings, out)
            if y is not None:
                return y, state, stats
    return kernels.normalize(batch, stats, params, settings.eps, out), state, stats if keep else None


def pullback(
    kernels: Kernels,
    dy: Array,
    batch: Batch,
    weight: Array | None,
    stats: Stats,
    eps: float,
    needs: tuple[bool, bool, bool] = ALL,
    replicas: Replicas | None = None,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of x, weight and bias, given that of the output; None for each that ``needs`` excludes.

    The gradient of x is that of the sum of the losses of all replicas; the others are those of this replica's loss.
    """
    if kernels.pullback is not None and needs == ALL and replicas is None:
        gradients = kernels.pullback(dy, batch, weight, stats, eps)
        if gradients is not None:
            return gradients
    needs_x, *needs_params = needs
    dx, sums = None, (None, None)
    is_constant = stats.count is None
    # Another replica may need these sums even if this one does not.
    is_shared = not is_constant and (needs_x if replicas is None else replicas.waits)
    if any(needs_params) or is_shared:
        sums = kernels.grad_sums(dy, batch, stats, eps)
    every = summed(sums, replicas) if is_shared else None
    if needs_x:
        dx = kernels.grad_input(dy, batch, stats, weight, eps, every)
    sum_dy, sum_dy_xhat = sums
    return dx, sum_dy_xhat, sum_dy
