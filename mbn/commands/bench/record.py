"""A measurement as strict JSON: every figure, with the versions and the machine."""

from typing import Any

from mbn.commands import records
from mbn.commands.bench.measurement import Measurement, Timed
from mbn.commands.processes import NotRun


def to_json(measurement: Measurement) -> str:
    """Return the measurement as a JSON document: seconds, bytes, and ratios to each peer that ran."""
    record = {
        "workload": measurement.workload._asdict(),
        "modes": measurement.modes,
        "limit": measurement.limit,
        "fastest_peer": {mode: measurement.fastest_peer(mode) for mode in measurement.modes},
        "subjects": [
            {"subject": spec, **_outcome(measurement, outcome)} for spec, outcome in measurement.subjects.items()
        ],
    }
    return records.to_json(record)


def _outcome(measurement: Measurement, outcome: Timed | NotRun) -> dict[str, Any]:
    if isinstance(outcome, NotRun):
        return records.not_run(outcome)
    peers = {spec: measurement.timed[spec] for spec in measurement.peers}
    return {
        "status": "ran",
        "version": outcome.prepared.version,
        "device": outcome.prepared.device,
        "seconds_per_call": {mode: outcome.median(mode) for mode in measurement.modes},
        "seconds_by_round": outcome.seconds,
        "ratio": {
            mode: {spec: outcome.ratio(mode, peer) for spec, peer in peers.items()} for mode in measurement.modes
        },
        "peak_bytes_beyond_arrays": outcome.prepared.memory,
        "first_call_seconds": outcome.prepared.first_call,
    }
