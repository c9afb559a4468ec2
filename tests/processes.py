"""Real processes of their own: the binaries as a scheduler starts them, on this machine."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]

# The binary with the tiny backbone, which is a backbone by name only where tests put it.
MAIN = """
import sys
import inreach_jax
from experiments import mvtec, runner
from tests import tiny
inreach_jax.load_backbone = lambda name, *, weights=None: tiny.backbone()
runner.main(mvtec.main, distributed=True)
"""


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


def start(
    args: Sequence[str],
    *,
    num: int = 1,
    devices: int = 1,
    main: str = MAIN,
    environment: dict[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts `num` processes that know of one another, each with so many CPU devices."""
    port = free_port()
    processes = []
    for i in range(num):
        env = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
            **(environment or {}),
        }
        mine = list(args)
        if num > 1:
            mine.append("--distributed")
            env |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(num),
                "JAX_PROCESS_ID": str(i),
            }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", main, *mine],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes: Sequence[subprocess.Popen[str]], *, timeout: float = 300) -> list[str]:
    """Waits for processes that must succeed; returns what each printed."""
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == 0, err[-3000:]
        printed.append(out)
    return printed


def metrics(out: pathlib.Path) -> dict[str, Any]:
    """`metrics.json` without what a rerun may change."""
    result: dict[str, Any] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    for name in ("seconds", "peak_memory_bytes", "command", "devices", "processes"):
        del result[name]
    return result
