"""Replicas: layers in several processes, devices or threads, which share the statistics of their batches."""

from mbn.replicas.exchange import Exchange, ReplicaError
from mbn.replicas.membership import Membership

__all__ = ["Exchange", "Membership", "ReplicaError"]
