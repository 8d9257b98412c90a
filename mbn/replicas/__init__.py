"""Replicas: layers in several processes, devices or threads, which share the statistics of their batches."""

from mbn.replicas.exchange import Exchange, Kind, ReplicaError
from mbn.replicas.membership import Membership
from mbn.replicas.population import Population

__all__ = ["Exchange", "Kind", "Membership", "Population", "ReplicaError"]
