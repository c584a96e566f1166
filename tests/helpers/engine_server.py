"""An inference engine for tests: models and adapters from folders, answers over HTTP on this machine."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.models import adapters
from experiments.models.adapters import llama_module
from experiments.reasoning.config import PRESETS
from experiments.reasoning.engine import generate
from experiments.reasoning.sampling import Sampling
from experiments.reasoning.sequences import pack
from experiments.reasoning.start import Start, start
from experiments.run.fields import changed


class Engine:
    """Writes answers of a model, which the first adapter names, with adapters added.

    Attributes:
        calls: the requests so far, by their addresses.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._models: dict[str, tuple[Start, Any]] = {}

    def load(self, lora_name: str, lora_path: str) -> dict[str, Any]:
        """Loads an adapter and the model that it is added to."""
        told = json.loads((Path(lora_path) / adapters.CONFIG).read_text())
        model = told["base_model_name_or_path"]
        base = start(changed(PRESETS["tiny"], {"model": model, "dtype": "float32"}).settled())
        params = base.params(jnp.int32(0))
        adapter = adapters.read(Path(lora_path), params, llama_module)
        self._models[lora_name] = base, jax.tree.map(jnp.asarray, adapters.add(params, adapter))
        return {}

    def unload(self, lora_name: str) -> dict[str, Any]:
        del self._models[lora_name]
        return {}

    def complete(
        self, model: str, prompt: list[str], max_tokens: int, temperature: float
    ) -> dict[str, Any]:
        base, params = self._models[model]
        eos = base.tokenizer.eos
        rule = Sampling(max_new_tokens=max_tokens, temperature=float(temperature))
        tokens = pack([base.tokenizer.encode(text) for text in prompt])
        written = generate(base.model, params, tokens, jax.random.key(0), rule, eos)
        texts = []
        for row, n in zip(written.tokens[:, 0], written.lengths[:, 0], strict=True):
            end = n - int(row[n - 1] in eos)
            texts.append(base.tokenizer.decode(row[:end].tolist()))
        return {"choices": [{"index": i, "text": text} for i, text in enumerate(texts)]}


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, Engine]]:
    """A server on a free port: its address, and the engine."""
    engine = Engine()
    at = {
        "/v1/load_lora_adapter": engine.load,
        "/v1/unload_lora_adapter": engine.unload,
        "/v1/completions": engine.complete,
    }

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            engine.calls.append(self.path)
            found = json.dumps(at[self.path](**content)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            self.wfile.write(found)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
