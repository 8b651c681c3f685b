"""A progress line on standard error: "Distilling [####    ] 12/40 30% loss 1.23, 0:12 elapsed, 0:28 left"."""

import sys
import time


def _clock(seconds: float) -> str:
    s = round(seconds)
    return f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"


class Progress:
    """Redraws one line of a terminal at most ten times a second; elsewhere a plain line at most every ten seconds.

    Nothing is drawn before the first half second, so that short work stays silent.
    """

    def __init__(self, label: str, total: int, shown: bool = True) -> None:
        self.label, self.total, self.shown = label, max(total, 1), shown
        self.start = self.last = time.monotonic()
        self.done, self.note, self.drawn = 0, "", False

    def update(self, done: int, note: str = "") -> None:
        self.done, self.note = done, note
        now = time.monotonic()
        if not self.shown or now - self.start < 0.5:
            return
        if self.drawn and now - self.last < (0.1 if sys.stderr.isatty() else 10.0):
            return
        self.last, self.drawn = now, True
        self._draw(final=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.drawn:
            self._draw(final=True)

    def _draw(self, final: bool) -> None:
        elapsed, share = time.monotonic() - self.start, min(self.done / self.total, 1.0)
        terminal = sys.stderr.isatty()
        filled = int(share * 24)
        bar = f"[{'#' * filled}{' ' * (24 - filled)}] " if terminal else ""
        note = f" {self.note}" if self.note else ""
        line = f"{self.label} {bar}{self.done}/{self.total} {100 * share:.0f}%{note}, {_clock(elapsed)} elapsed"
        if not final and self.done:
            line += f", {_clock(elapsed * (self.total - self.done) / self.done)} left"
        end = "\n" if final or not terminal else ""
        print(f"\r{line}\x1b[K{end}" if terminal else line, end=end if terminal else "\n", file=sys.stderr, flush=True)
