"""Units of several documents: what one row becomes where an objective compares answers, such as a better and a worse one.

The documents of a unit follow one another in the tables, and are shuffled, packed and dealt together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from tritune.trainer.data.encoded import BEYOND, Encoded, Encoder
from tritune.trainer.data.kinds import Record
from tritune.trainer.errors import InputError


class Units:
    """Encodes each record as the documents that an objective makes of it; without one of them its row is left out whole.

    Args:
        encoder: of one document, each of which becomes one row (`data.last_turn_only`).
        documents_of: the documents of a record.
        count: how many these are.
    """

    def __init__(self, encoder: Encoder, documents_of: Callable[[Record], Sequence[Record]], count: int) -> None:
        self.encoder, self.documents_of, self.count = encoder, documents_of, count

    def __call__(self, records: Sequence[Record]) -> Encoded:
        out = Encoded()
        whole, documents = [], []
        for record in records:
            try:
                unit = [replace(document, place=record.place) for document in self.documents_of(record)]
                if len(unit) != self.count:
                    rule = f"the objective makes {len(unit)} documents of it, and a unit has {self.count}"
                    raise InputError(record.place, rule, "Mend documents_of in the objective's file")
                documents.append(unit)
                whole.append(record)
            except InputError as error:
                out.bad.append(error)
        roles = [self.encoder([unit[role] for unit in documents]) for role in range(self.count)]
        rows = [{place: number for number, place in enumerate(role.columns.places)} for role in roles]
        lost = self._lost(roles, out)
        for record in whole:
            if record.place in lost:
                continue
            digest = record.digest()  # of the whole row: its documents are no repetition where one of them is
            point = record.point(digest)
            for role, (encoded, by_place) in enumerate(zip(roles, rows, strict=True)):
                number = by_place[record.place]
                out.remarks += [replace(r, row=len(out.columns)) for r in encoded.remarks if r.row == number]
                out.columns.copy(encoded.columns, number, hashlib.sha256(digest + b"%d" % role).digest()[:16])
                out.stops.append(encoded.stops[number])
                out.points.append(point)
        return out

    def _lost(self, roles: list[Encoded], out: Encoded) -> set[str]:
        """The places of rows of which a document was left out; each is noted once, as the first of its documents was."""
        lost: set[str] = set()
        for encoded in roles:
            for kind in ("bad", "dropped", "too_long"):
                for one in getattr(encoded, kind):
                    place = one.value if isinstance(one, InputError) else one.removesuffix(BEYOND)
                    if place not in lost:
                        getattr(out, kind).append(one)
                        lost.add(place)
        return lost
