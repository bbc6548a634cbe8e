"""Compatible representations in JAX: upgrade a retrieval model without re-indexing its gallery."""

__version__ = "0.1.0"
