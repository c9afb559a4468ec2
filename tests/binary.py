"""Binaries of experiments/, run inside the test's process: starting another takes seconds."""

import importlib
import sys
from types import ModuleType

import pytest
from absl import flags

from experiments import runner


def forget_flags() -> None:
    """Undefines the flags of all binaries, which share names, and unparses the others."""
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in list(defined):  # deleting shortens it
            if module.startswith("experiments"):
                delattr(flags.FLAGS, flag.name)
            else:
                flag.unparse()
    flags.FLAGS.unparse_flags()


def load(name: str) -> ModuleType:
    """The module `experiments.<name>`, its flags defined afresh."""
    forget_flags()
    sys.modules.pop(f"experiments.{name}", None)
    return importlib.import_module(f"experiments.{name}")


def run(module: ModuleType, *args: object) -> None:
    """Runs a binary as its command line would.

    Raises:
      SystemExit: with the message where it fails; with None where it does not.
    """
    name = module.__name__.rpartition(".")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, args)])
        for flag in flags.FLAGS:
            flags.FLAGS[flag].unparse()
        runner.main(module.main)


def succeeds(module: ModuleType, *args: object) -> None:
    """Runs a binary that must succeed."""
    with pytest.raises(SystemExit) as stop:
        run(module, *args)
    assert stop.value.code in (None, 0), stop.value.code


def fails(module: ModuleType, *args: object) -> str:
    """Runs a binary that must end with a message, and returns it."""
    with pytest.raises(SystemExit) as stop:
        run(module, *args)
    assert stop.value.code not in (None, 0)
    return str(stop.value.code)
