"""A page in a browser: what an old gallery answers to each version, while it is embedded again."""

from etils import epy

# Imported when first used: the server is an extra.
with epy.lazy_api_imports(globals()):
    from compat_jax.demo.picks import Pick, in_memory, picks_of
    from compat_jax.demo.preparing import prepare
    from compat_jax.demo.server import Limits, application
    from compat_jax.demo.showcase import Showcase

__all__ = ["Limits", "Pick", "Showcase", "application", "in_memory", "picks_of", "prepare"]
