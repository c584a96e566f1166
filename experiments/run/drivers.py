"""The drivers by name, and whose run a folder is. Imports nothing heavy."""

import importlib
from pathlib import Path

from experiments.run.driver import Driver
from experiments.run.errors import UsageError
from experiments.run.fields import changed, from_json
from experiments.run.folder import read_config
from experiments.run.settings import RunSettings

# The folder of each driver; its `__init__` has the record.
FOLDERS = {
    "rl": "experiments.rl",
    "pretrain": "experiments.pretrain",
    "reasoning": "experiments.reasoning",
    "supervised": "experiments.supervised",
    "optimizers": "experiments.optimizers",
}


def find_driver(name: str) -> Driver:
    """The driver of a name.

    Raises:
        KeyError: where there is none.
    """
    found: Driver = importlib.import_module(FOLDERS[name]).DRIVER
    return found


def driver_of(config: RunSettings) -> Driver:
    """The driver that settings are for."""
    return find_driver(config.driver)


def read_settings(path: Path) -> tuple[Driver, RunSettings]:
    """The driver and the settings of a run.

    Raises:
        UsageError: if the folder holds no run.
    """
    content = dict(read_config(path))
    name = content.pop("driver", None)
    if not isinstance(name, str) or name not in FOLDERS:
        raise UsageError(f"{path}/config.json names the driver {name!r}, which there is not")
    driver = find_driver(name)
    try:
        return driver, from_json(driver.config, content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def check_run(path: Path) -> None:
    """Raises UsageError where a folder holds no run with a checkpoint; nothing heavy is imported."""
    settings_to_read(path)
    folder = path / "checkpoints"
    if not folder.is_dir() or not any(one.name.isdecimal() for one in folder.iterdir()):
        raise UsageError(f"{path} has no checkpoint yet")


def settings_to_read(path: Path) -> tuple[Driver, RunSettings]:
    """The driver of a run, and its settings as those of one that is read."""
    driver, config = read_settings(path)
    try:
        # The folder may have been moved, and what is in it is to be read, not replaced.
        config = changed(config.on_one_device(), run_dir=path, overwrite=False).settled()
        config.check()
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return driver, config
