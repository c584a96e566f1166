"""What names a model: a new one's family, a folder, a GGUF file, or OWNER/NAME on the Hugging Face hub."""

from pathlib import Path

from experiments.models.config_json import read_json
from experiments.models.importing import SMOLLM2, check_gguf, folder_of_smollm2, is_gguf
from experiments.run.errors import UsageError, suggestion
from experiments.run.paths import exists

FOLDER = Path(__file__).parent


def new_models() -> tuple[str, ...]:
    """The families that have new models: each is a file `NAME_family.py`, which is not imported here.

    Example:
        >>> new_models()
        ('rwkv7', 'transformer')
    """
    files = FOLDER.glob("*_family.py")
    return tuple(sorted(file.name.removesuffix("_family.py") for file in files))


def check_model(name: str) -> None:
    """Raises UsageError for a name that is no model's, as far as that is seen without the hub."""
    if name in new_models():
        return
    folder = Path(name)
    if name and exists(folder, f"--model {name}") and folder.is_dir():
        read_json(folder / "config.json")
    elif is_gguf(name):
        check_gguf(name, f"--model {name}")
    elif name == SMOLLM2:
        folder_of_smollm2(f"--model {name}")
    elif not of_hub(name):
        raise UsageError(
            f"--model {name} is no folder, nor OWNER/NAME of the Hugging Face hub, nor a GGUF file"
            f"{suggestion(name, (*new_models(), SMOLLM2))}"
        )


def of_hub(name: str) -> bool:
    """Whether a name could be one of the Hugging Face hub.

    Example:
        >>> of_hub("Qwen/Qwen3-0.6B"), of_hub("qwen"), of_hub("../qwen")
        (True, False, False)
    """
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and name[-1] != "/"
