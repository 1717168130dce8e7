"""TensorBoard: event files under `<run dir>/tensorboard`. Nothing but files on this machine."""

from __future__ import annotations

from pathlib import Path

import yaml


class TensorBoardSink:
    """Writes through `torch.utils.tensorboard`; every row is with the operating system when `log` returns."""

    def __init__(self, directory: Path, resolved: dict, state_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A killed run logged steps beyond its checkpoint, which come again: TensorBoard drops the old ones.
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=state_step + 1)
        self._step = state_step
        text = yaml.safe_dump(resolved, sort_keys=False)
        # Markdown shows lines that are indented by four as they are.
        self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), state_step)
        self._writer.flush()

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._step = step
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def summary(self, figures: dict[str, float]) -> None:
        """TensorBoard has no summary: the figures stand at the last step."""
        self.log(self._step, figures)

    def close(self, exit_code: int) -> None:
        self._writer.close()
