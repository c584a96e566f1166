"""Settings of every test: eight host devices, checked shapes, a compilation cache, fixed examples."""

import os
from pathlib import Path

# Before JAX starts: its devices are fixed then.
os.environ["JAX_PLATFORMS"] = "cpu"
# At the lowest optimisation, since the tests compile more than they run.
flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import hypothesis
import jax
from jaxtyping import install_import_hook

# Shapes and types in signatures are checked at every call.
install_import_hook(["eggroll", "experiments", "optim"], "beartype.beartype")

cache = Path(os.environ.get("EGGROLL_TEST_CACHE", Path(__file__).parent / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

hypothesis.settings.register_profile(
    "project", deadline=None, derandomize=True, max_examples=30, database=None
)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("project")
