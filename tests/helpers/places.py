"""Where things are: the project's root, its docs, and the compilation cache that processes of tests share."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HELPERS = ROOT / "tests" / "helpers"
CACHE = os.environ.get("EGGROLL_TEST_CACHE", str(ROOT / ".cache" / "jax"))
