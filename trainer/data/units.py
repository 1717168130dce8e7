"""Units of several documents: what one row becomes where an objective compares answers, such as a better and a worse one.

The documents of a unit follow one another in the tables, and are shuffled, packed and dealt together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tritune.trainer.data.encoded import Encoded, Encoder
from tritune.trainer.data.kinds import Record
from tritune.trainer.errors import InputError


class Units:
    """Encodes each record as the documents that an objective makes of it; without one of them its row is left out whole.

    Args:
        encoder: of one document, each of which becomes one row (`data.last_turn_only`).
        documents_of: the documents of a record, always equally many.
    """

    def __init__(self, encoder: Encoder, documents_of: Callable[[Record], Sequence[Record]]) -> None:
        self.encoder, self.documents_of = encoder, documents_of

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out = Encoded()
        whole, documents = [], []
        for record in records:
            try:
                documents.append([replace(d, place=record.place) for d in self.documents_of(record)])
                whole.append(record)
            except InputError as error:
                out.bad.append(error)
        roles = [
            self.encoder([unit[role] for unit in documents]) for role in range(len(documents[0]) if documents else 0)
        ]
        rows = [{place: number for number, place in enumerate(role.columns.places)} for role in roles]
        lost = self._lost(roles, out)
        for record in whole:
            if record.place in lost:
                continue
            point = record.point(record.digest())
            for encoded, by_place in zip(roles, rows, strict=True):
                number = by_place[record.place]
                out.remarks += [replace(r, row=len(out.columns)) for r in encoded.remarks if r.row == number]
                out.columns.copy(encoded.columns, number)
                out.stops.append(encoded.stops[number])
                out.points.append(point)
        return out

    def _lost(self, roles: list[Encoded], out: Encoded) -> set[str]:
        """The places of rows of which a document was left out; each is noted once, as the first of its documents was."""
        lost: set[str] = set()
        for encoded in roles:
            for kind in ("bad", "dropped", "too_long"):
                for one in getattr(encoded, kind):
                    place = one.value if isinstance(one, InputError) else one.partition(" (")[0]
                    if place not in lost:
                        getattr(out, kind).append(one)
                        lost.add(place)
        return lost
