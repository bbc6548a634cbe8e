"""The chain of model versions: a record per version, and the folder that holds them."""

from compat_jax.chain.record import Record, Version, variables_sha256
from compat_jax.chain.store import Chain, CorruptEntry, NoSuchVersion

__all__ = ["Chain", "CorruptEntry", "NoSuchVersion", "Record", "Version", "variables_sha256"]
