"""The families of language models that there are, and how the family of a model is found."""

from pathlib import Path
from typing import Any

from experiments.models import config_json as fields
from experiments.models import rwkv7_family, transformer_family
from experiments.models.family import Family, ModelConfig
from experiments.run.errors import UsageError, suggestion

# One line a family.
ALL: tuple[Family[Any], ...] = (
    transformer_family.FAMILY,
    rwkv7_family.FAMILY,
)
# By the names that --model has for new models.
FAMILIES: dict[str, Family[Any]] = {family.name: family for family in ALL}


def of(config: ModelConfig) -> Family[Any]:
    """The family of a configuration.

    Raises:
        TypeError: for a configuration of no family.

    Example:
        >>> from experiments.models.rwkv7 import RWKV7Config
        >>> of(RWKV7Config(vocab_size=7, hidden_size=64, num_hidden_layers=2)).name
        'rwkv7'
    """
    for family in FAMILIES.values():
        if type(config) is family.config:
            return family
    right = ", ".join(family.config.__name__ for family in FAMILIES.values())
    raise TypeError(f"the config must be one of {right}, got {type(config).__name__}")


def of_folder(folder: Path) -> Family[Any]:
    """The family that reads a model's folder, by its config.json.

    Raises:
        UsageError: where there is no config.json, or no family reads such a folder.
    """
    told = fields.read_json(folder / "config.json")
    for family in FAMILIES.values():
        if family.reads(told):
            return family
    right = [name for family in FAMILIES.values() for name in family.architectures]
    types = [name for family in FAMILIES.values() for name in family.model_types]
    try:
        names = fields.texts(told, "architectures")
    except UsageError as error:
        raise UsageError(f"{folder}: {error}") from error
    raise UsageError(
        f"{folder}: config.json: architectures {fields.shown(names)} is not supported; one of "
        f"{', '.join(right)} is, or the model_type {' or '.join(map(repr, types))}"
        + suggestion(names[0], right)
    )
