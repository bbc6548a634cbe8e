"""Galleries in vector stores: rows that say which version embedded them, and old ones that answer on."""

from etils import epy

# Imported when first used: a program that only asks need not load what checks versions.
with epy.lazy_api_imports(globals()):
    from compat_jax.gallery.checking import check
    from compat_jax.gallery.enlarging import enlarge
    from compat_jax.gallery.gallery import Gallery
    from compat_jax.gallery.originals import Work
    from compat_jax.gallery.places import open_store
    from compat_jax.gallery.rule import Terms
    from compat_jax.gallery.store import Where
    from compat_jax.gallery.verdict import Verdict
    from compat_jax.spaces import differences

__all__ = [
    "Gallery",
    "Terms",
    "Verdict",
    "Where",
    "Work",
    "check",
    "differences",
    "enlarge",
    "open_store",
]
