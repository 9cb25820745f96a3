"""What retention knows of a study: rows of the index, one a series, put together study by study.

The statement reads every instance once, in the order of an index, and sorts nothing: memory does not grow with the
store.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

_texts = msgspec.json.Decoder(list[str])


class SeriesFacts(msgspec.Struct, frozen=True, gc=False):
    """A series, as rules look at it; all instances count, whatever their state.

    ``kinds`` are the pairs of SOP class and calling AE title that occur. ``first`` and ``last`` are times of reception,
    RFC 3339 in UTC; ``undated`` counts those that are no such time.
    """

    uid: str
    modality: str
    kinds: tuple[tuple[str, str], ...]
    first: str
    last: str
    undated: int = 0


class StudyFacts(msgspec.Struct, frozen=True, gc=False):
    """A study, its series, and what hinders its erasure.

    ``study_dates`` and ``birth_dates`` are the different texts (VR DA) that its instances say, empty ones among them:
    where several are known, the one counts that keeps the study longest. ``space`` is what its packs take, in bytes.
    The rest are numbers of instances: undecided in quarantine, in conflict, in deposits that wait for admission, in
    packs with records that do not open, in a state that this release does not know.
    """

    uid: str
    series: tuple[SeriesFacts, ...]
    study_dates: tuple[str, ...] = ()
    birth_dates: tuple[str, ...] = ()
    patient_id: str = ""
    issuer: str = ""
    instances: int = 0
    packs: int = 0
    space: int = 0
    quarantined: int = 0
    conflicting: int = 0
    waiting: int = 0
    damaged: int = 0
    unknown: int = 0


# Subqueries beside an aggregate are asked once a group. A pack's first record is at byte 4096: it counts the pack.
# JSON, because an AE title may hold any separator; a UID holds no space.
STATEMENT = """
SELECT i.study, i.series,
  (SELECT json_array(s.study_date, s.patient_birth_date, s.patient_id, s.patient_id_issuer)
     FROM study s WHERE s.uid = i.study),
  (SELECT e.modality FROM series e WHERE e.study = i.study AND e.uid = i.series),
  json_group_array(DISTINCT i.sop_class || ' ' || i.calling),
  min(i.received_at), max(i.received_at),
  sum(i.received_at NOT GLOB '[0-9][0-9][0-9][0-9]-[01][0-9]-[0-3][0-9]T*Z'),
  count(*),
  sum(i."offset" = 4096),
  sum(CASE WHEN i."offset" = 4096 THEN (SELECT p.length FROM pack p WHERE p.id = i.pack) ELSE 0 END),
  sum(i.state = 'quarantined'),
  sum(i.state = 'conflict'),
  sum(i.state = 'pending' OR i.pack IN (SELECT p.id FROM pack p WHERE p.place = 'incoming')),
  sum(i.pack IN (SELECT u.pack FROM unreadable u)),
  sum(i.state NOT IN ('held', 'again', 'same', 'encoding', 'replaced', 'damaged', 'quarantined', 'conflict', 'pending'))
FROM instance i {where} GROUP BY i.study, i.series ORDER BY i.study, i.series"""
ALL = STATEMENT.format(where="")
# The same of one study, whose UID is the only value: to decide again just before it goes.
ONE = STATEMENT.format(where="WHERE i.study = ?")


def gather(rows: Iterable[tuple[Any, ...]]) -> Iterator[StudyFacts]:
    """Yield studies from the statement's rows, in their order; one study is in memory at a time."""
    for uid, group in itertools.groupby(rows, key=lambda row: str(row[0])):
        yield _study(uid, list(group))


def _study(uid: str, rows: list[tuple[Any, ...]]) -> StudyFacts:
    # Of a study of which all is in quarantine nothing is described.
    study_date, birth_date, patient_id, issuer = _texts.decode(rows[0][2]) if rows[0][2] else ("", "", "", "")
    series = tuple(
        SeriesFacts(
            row[1],
            row[3] or "",
            tuple((kind.partition(" ")[0], kind.partition(" ")[2]) for kind in _texts.decode(row[4])),
            *row[5:8],
        )
        for row in rows
    )
    sums = [sum(column) for column in zip(*(row[8:] for row in rows), strict=True)]
    return StudyFacts(uid, series, (study_date,), (birth_date,), patient_id, issuer, *sums)
