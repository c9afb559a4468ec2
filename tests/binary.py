"""Binaries of experiments/, run inside the test's process: starting another takes seconds."""

import sys
from types import ModuleType

import pytest
from absl import flags

from experiments import runner


def unparse() -> None:
    """Back to before any command line was read."""
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()


def succeeds(module: ModuleType, *args: object) -> None:
    """Runs a binary that must succeed."""
    code = _exit_code(module, args)
    assert code in (None, 0), code


def fails(module: ModuleType, *args: object) -> str:
    """Runs a binary that must fail, and returns its exit code or its last words."""
    code = _exit_code(module, args)
    assert code not in (None, 0)
    return str(code)


def _exit_code(module: ModuleType, args: tuple[object, ...]) -> str | int | None:
    name = module.__name__.rpartition(".")[2]
    unparse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runner.main(module.main)
    unparse()
    return stop.value.code
