"""What becomes of records when they are tokenized, and who does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from tritune.trainer.config.choices import Overlong
from tritune.trainer.config.data import DataConfig
from tritune.trainer.data.examples import Columns
from tritune.trainer.data.kinds import Record
from tritune.trainer.data.remarks import Remark
from tritune.trainer.errors import InputError

BEYOND = " (its answer lies beyond the cut)"  # said after the place of a row that is left out


@dataclass
class Encoded:
    """What became of some records.

    Attributes:
        columns: the rows that can be trained on; `stops` and `points` are one a row: whether a stop token is trained, and where
            the row lies when its source is divided.
        wholes: place -> that of the row that it is a part of, where they differ.
        token_bytes: one array a row: how many bytes of the text each token is the first to reach the end of; text only.
        bad: faults of rows that are left out. dropped: places of rows without a supervised token, with why.
        too_long: places of rows left out above `data.max_length`.
        remarks: what is said of rows in `columns`, which number them.
    """

    columns: Columns = field(default_factory=Columns)
    stops: list[bool] = field(default_factory=list)
    points: list[float] = field(default_factory=list)
    wholes: dict[str, str] = field(default_factory=dict)
    token_bytes: list[np.ndarray] = field(default_factory=list)
    bad: list[InputError] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)

    def fits(self, length: int, place: str, data: DataConfig) -> bool:
        """Whether a row is kept, cut or not; notes it otherwise, as a bad one where the config refuses rows that are too long."""
        if length <= data.max_length or data.overlong.cuts:
            return True
        if data.overlong is Overlong.refuse:
            rule = f"the row has {length:,} tokens, and data.max_length={data.max_length}"
            self.bad.append(
                InputError(place, rule, "Raise it, shorten the row, or data.overlong=cut_prompt_start|drop")
            )
        else:
            self.too_long.append(place)
        return False


class Encoder(Protocol):
    """Encodes a list of records. Forked processes inherit it."""

    def __call__(self, records: Sequence[Record]) -> Encoded: ...
