"""Progress bars with an estimate, and how long each phase took."""

import time

from tqdm import tqdm


class PhaseTimer:
    """A `Progress` that shows one bar per phase and keeps the seconds of each.

    Use it as a context manager around the work; phases follow one another.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self.seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._bar: tqdm[None] | None = None
        self._last = time.perf_counter()

    def __enter__(self) -> "PhaseTimer":
        self._last = time.perf_counter()
        return self

    def __exit__(self, *unused: object) -> None:
        self._close()

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Shows a step and counts its time towards its phase."""
        now = time.perf_counter()
        if phase != self._phase or self._bar is None:
            self._close()
            self._phase = phase
            self._bar = tqdm(
                total=total,
                desc=f"{phase:<12}",
                unit="img",
                mininterval=0.5,
                disable=self._silent,
            )
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
        self._bar.update(done - self._bar.n)
        if done == total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
