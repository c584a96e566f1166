"""Compiled programs are kept on disk, so that the second run of a driver starts in a fraction."""

import os
from pathlib import Path


def keep_compiled_programs() -> None:
    """Switch JAX's persistent compilation cache on, for all programs however small.

    The folder is `eggroll/jax` in the user's cache folder; `JAX_COMPILATION_CACHE_DIR`, JAX's own
    variable, names another, and `JAX_ENABLE_COMPILATION_CACHE=0` does without.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "eggroll" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
