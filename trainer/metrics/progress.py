"""What the user sees: a live line in a terminal, plain lines elsewhere; always also in `train.log`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from tritune.trainer.shown import shown

PLAIN_SECONDS = 10.0  # between plain lines


class Progress:
    """Prints on rank 0 and is silent on the others.

    Args:
        enabled: whether this is rank 0.
        stream: where lines go; a terminal gets one line that is rewritten.
    """

    def __init__(self, enabled: bool, stream: IO[str] | None = None) -> None:
        self.enabled, self.stream = enabled, stream or sys.stderr
        self.live = enabled and self.stream.isatty()
        self._log: IO[str] | None = None
        self._printed, self._said = 0.0, time.perf_counter()
        self._reading: tuple[str, float] | None = None
        self._seconds_per_step, self._last = 0.0, (0, time.perf_counter())

    def open_log(self, path: Path) -> None:
        if self.enabled:
            self._log = path.open("a")

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            text = shown(text)
            self._put(("\r\033[K" if self.live else "") + text + "\n")
            self._write_log(text)

    def reading(self, name: str, rows: int, tokens: int) -> None:
        """Show how far a source was tokenized: always in a terminal, elsewhere every ten seconds."""
        if not self.enabled:
            return
        now = time.perf_counter()
        if self._reading is None or self._reading[0] != name:
            self._reading = (name, now)
        seconds = max(now - self._reading[1], 1e-9)
        line = shown(f"data      {name}: {rows:,} rows, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s")
        if self.live:
            self._put("\r\033[K" + line)
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            self.say(line)

    def step(self, row: dict[str, Any], total_steps: int) -> None:
        """Show a step; in a terminal each, elsewhere the first, the last and one every ten seconds."""
        if not self.enabled:
            return
        now, step = time.perf_counter(), row["step"]
        before, then = self._last
        if step > before and before:
            seconds = (now - then) / (step - before)
            self._seconds_per_step = 0.9 * self._seconds_per_step + 0.1 * seconds if self._seconds_per_step else seconds
        self._last = (step, now)
        line = self._line(row, total_steps)
        if self.live:
            self._put("\r\033[K" + line)
        plain = now - self._printed >= PLAIN_SECONDS or step == total_steps
        if plain:
            self._printed = now
            self._write_log(line)
            if not self.live:
                self._put(line + "\n")

    def pause(self, seconds: float) -> None:
        """Leave evaluation out of the remaining time's estimate."""
        self._last = (self._last[0], self._last[1] + seconds)

    def close(self) -> None:
        if self.live:
            self._put("\n")
        if self._log is not None:
            self._log.close()
            self._log = None

    def _put(self, text: str) -> None:
        """Print; where whoever read it is gone (a closed terminal, `| head`), the run goes on, and says so in its log."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())  # what is still in the buffer goes there, and whatever others print
            os.close(nowhere)
            self.live = False
            self._write_log(f"nobody reads what is printed any more ({error.strerror}): it stands here alone")

    def _line(self, row: dict[str, Any], total_steps: int) -> str:
        step = row["step"]
        left = self._seconds_per_step * (total_steps - step)
        return (
            f"step {step}/{total_steps}  loss {row['loss']:.4f}  grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
            f"{row['tokens_per_second']:,.0f} tok/s  {row['memory_gib']:.2f} GiB  ETA {duration(left)}"
        )

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            try:
                self._log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text + "\n")
                self._log.flush()
            except OSError as error:  # a full disk must not stop the run from saying so
                self._log = None
                self._put(f"train.log is not written any more: {error.strerror}\n")


def duration(seconds: float) -> str:
    """`4:05` or `1:02:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
