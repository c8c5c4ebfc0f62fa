"""One line that tells how far a long step is."""

import shutil
import sys
import time

QUIET_SECONDS = 15  # between two lines where the output is a file, which cannot overwrite a line


class Progress:
    """On a terminal the line is overwritten; in a log file it is written now and then.

        with Progress("Installing") as progress:
            progress.show("torch")

    Leaving it writes how long the step took.
    """

    def __init__(self, step: str, stream=None):
        self.step = step
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.started = self.spoke = time.monotonic()
        self.last = None

    def __enter__(self):
        self.stream.write(f"{self.step} ..." if self.terminal else f"{self.step} ...\n")
        self.stream.flush()
        return self

    def show(self, detail: str) -> None:
        if detail == self.last:
            return
        if self.terminal:
            self.overwrite(f"{self.step}: {detail}")
        elif time.monotonic() - self.spoke > QUIET_SECONDS:
            self.stream.write(f"  {detail}\n")
            self.spoke = time.monotonic()
        self.last = detail
        self.stream.flush()

    def overwrite(self, line: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.stream.write("\r" + line[:width].ljust(width))

    def __exit__(self, kind, error, trace):
        outcome = "stopped" if kind else "done"
        line = f"{self.step}: {outcome} after {duration(time.monotonic() - self.started)}"
        if self.terminal:
            self.overwrite(line)
            line = ""
        self.stream.write(line + "\n")
        self.stream.flush()


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
