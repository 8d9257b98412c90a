"""One of two processes that share statistics by jax.distributed; test_mbn_jax_replicas.py starts both."""

import sys
from functools import partial
from pathlib import Path

import jax

rank, address, path = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    address,
    num_processes=2,
    process_id=rank,
    initialization_timeout=60,
    shutdown_timeout_seconds=60,
    coordinator_bind_address=address if rank == 0 else None,
)

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_replica_samples import AXIS, assert_close, bound, halves, layer, sample, step, undivided

same, sharded = PartitionSpec(), PartitionSpec(AXIS)
mesh = Mesh(np.array(jax.devices()), (AXIS,))
assert jax.process_count() == mesh.size == 2
for kind in ("rows", "a masked shard", "sample weights", "offset"):
    bn, batch = layer(AXIS), sample(kind)
    own = jax.tree.map(lambda array: np.asarray(array[rank]), halves(batch))
    parts = jax.tree.map(partial(jax.make_array_from_process_local_data, NamedSharding(mesh, sharded)), own)
    params = jax.device_put(jax.tree.map(np.asarray, bn.params), NamedSharding(mesh, same))
    run = jax.shard_map(
        partial(step, bn), mesh=mesh, in_specs=(same, sharded), out_specs=((sharded, sharded), same, same)
    )
    arrays, dparams, state = jax.tree.map(lambda array: array.addressable_data(0), jax.jit(run)(params, parts))
    expected, *vectors = undivided(batch)
    assert_close(arrays, [halves(array)[rank] for array in expected], bound(kind))
    assert_close((dparams, state), vectors, bound(kind))
path.write_bytes(b"".join(np.asarray(array).tobytes() for array in state))
