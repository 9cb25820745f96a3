"""A large value by its address: tags and item numbers from the data set inwards, as metadata names them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from storescp.desk.multipart import Buffer
from storescp.desk.web_dataset import DEPTH_LIMIT, DatasetError, Element, Item, Reader
from storescp.desk.web_json import little_endian, word_length

_TAG = re.compile(r"[0-9A-Fa-f]{8}", re.ASCII)
_NUMBER = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)


class PathError(ValueError):
    """It is no address of a value."""


def path_of(text: str) -> list[int]:
    """Return the tags and item numbers of an address, a tag first and last.

    Raises:
        PathError: It is none.
    """
    parts = text.split("/")
    if len(parts) % 2 == 0 or len(parts) > 2 * DEPTH_LIMIT:
        raise PathError("no address of a value")
    found = list[int]()
    for at, part in enumerate(parts):
        if not (_NUMBER if at % 2 else _TAG).fullmatch(part):
            raise PathError("no address of a value")
        found.append(int(part) if at % 2 else int(part, 16))
    return found


def bulk(reader: Reader, path: list[int]) -> Iterator[Buffer]:
    """Yield a value in pieces, its words little endian; of encapsulated pixels the fragments one after the other.

    Nothing is yielded where there is no such value.

    Raises:
        DatasetError: The data set cannot be read.
    """
    return _of_item(reader, reader.top, path)


def _of_item(reader: Reader, item: Item, path: list[int]) -> Iterator[Buffer]:
    for element in reader.elements(item):
        if element.tag == path[0]:
            if len(path) > 1:
                yield from _within(reader, element, path)
            elif element.is_encapsulated:
                for fragment in itertools.islice(reader.items(element), 1, None):
                    yield from reader.pieces(fragment.length)
            elif not element.has_items:
                yield from _words(reader, element, item)
            # What comes behind is not read.
            return


def _within(reader: Reader, element: Element, path: list[int]) -> Iterator[Buffer]:
    if not element.has_items or element.is_encapsulated:
        return
    for number, inner in enumerate(reader.items(element), 1):
        if number == path[1]:
            yield from _of_item(reader, inner, path[2:])
            return


def _words(reader: Reader, element: Element, item: Item) -> Iterator[Buffer]:
    if item.encoding.little_endian or word_length(element.vr) == 1:
        yield from reader.pieces(element.length)
        return
    # Big endian is retired; what was stored in it is small.
    if element.vr not in {"OW", "OL", "OF", "OD", "OV"}:
        raise DatasetError("a data set cannot be read: a big endian value of this kind is not given")
    yield little_endian(reader.value(element, 1 << 28), element.vr, item.encoding)
