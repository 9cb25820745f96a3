"""WADO-RS's requests: instances, metadata, frames, bulk data and drawn frames, streamed from the vault.

Source: PS3.18 10.4.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Generator, Iterator, Sequence

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from storage.attributes import is_uid
from storage.selection import Selection
from storescp.desk import transcode, web_accept, web_render
from storescp.desk.asking import Asking, AskingError
from storescp.desk.multipart import Buffer, Multipart
from storescp.desk.transcode import TranscodeError
from storescp.desk.web_accept import ANY, DICOM, EXPLICIT, OCTETS, Choice
from storescp.desk.web_bulk import PathError, bulk, path_of
from storescp.desk.web_dataset import DatasetError, Reader
from storescp.desk.web_errors import Refusal
from storescp.desk.web_json import Described, Describing
from storescp.desk.web_pixels import Layout, NoFrameError, Pixels
from storescp.desk.web_render import DrawError
from storescp.desk.web_search import PREFIX, accepted
from storescp.desk.web_stream import Streamed, Threads, Told
from storescp.errors import FAILED
from storescp.gate.transfer import ENCODINGS
from storescp.handover import BrokenError, HandoverError, Instance, Taking
from storescp.part10 import header

# Frames may be asked for in any order; each turn back is another retrieval.
FRAMES_LIMIT, TURNS_LIMIT = 1000, 16
# Objects in memory for another transfer syntax, and pixels to draw, are few at a time.
_IN_MEMORY = 2
_NOT_HERE = "nothing here is known by that name"
_CANNOT = "this cannot be given in the transfer syntaxes that are accepted; transfer-syntax=* gives it as it is stored"
_NATIVE = frozenset({"1.2.840.10008.1.2", EXPLICIT, "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"})
Content = Generator[Buffer, None, None]

log = logging.getLogger(__name__)


class Retrieving:
    """Gives what a peer asks for by name."""

    def __init__(self, asking: Asking, most: int) -> None:
        self._asking = asking
        self._threads = Threads(most)
        self._heavy = threading.BoundedSemaphore(_IN_MEMORY)

    # --- Instances

    async def objects(self, request: Request) -> Response:
        """Give all instances of a study, series or instance as DICOM files."""
        wanted = _Wanted(request, "instances")
        choices = list(web_accept.instances(accepted(request)))
        if not choices:
            raise Refusal(406, "instances are given as multipart/related of application/dicom")
        if not choices[0].multipart and not wanted.is_instance:
            choices = [choice for choice in choices if choice.multipart]
            if not choices:
                raise Refusal(406, "more than one instance is given as multipart/related")
        if choices[0].multipart:
            body = Multipart(DICOM)
            return Streamed(self._threads, self._files(wanted, choices, body), body.content_type)
        return Streamed(self._threads, self._files(wanted, choices, None), DICOM)

    def _files(self, wanted: _Wanted, choices: list[Choice], body: Multipart | None) -> Content:
        with self._taken(wanted) as taking:
            for kind in taking.manifest.kinds:
                # What cannot be given is said before anything is.
                _syntax(kind.transfer_syntax, choices)
            for instance, parts in taking.instances():
                syntax = _syntax(instance.transfer_syntax, choices)
                file = self._file(instance, parts, syntax)
                wanted.told.instances += 1
                if body is None:
                    yield from file
                else:
                    yield from body.part(f"{DICOM};transfer-syntax={syntax}", file)
            if body is not None:
                yield body.end()

    def _file(self, instance: Instance, parts: Iterator[Buffer], syntax: str) -> Iterator[Buffer]:
        head = header(
            sop_class=instance.sop_class,
            sop_instance=instance.sop,
            transfer_syntax=syntax,
            source=instance.calling,
        )
        if syntax == instance.transfer_syntax:
            yield head
            yield from parts
            return
        if instance.length > transcode.LIMIT:
            raise Refusal(406, _CANNOT)
        with self._heavy:
            try:
                changed = transcode.transcode(instance, parts, syntax)
            except TranscodeError:
                raise Refusal(406, _CANNOT) from None
        yield head
        yield changed

    # --- Metadata

    async def metadata(self, request: Request) -> Response:
        """Describe instances in the DICOM JSON Model."""
        wanted = _Wanted(request, "metadata")
        kind = web_accept.documents(accepted(request))
        if not kind:
            raise Refusal(406, "metadata is application/dicom+json")
        return Streamed(self._threads, self._described(wanted), kind)

    def _described(self, wanted: _Wanted) -> Content:
        with self._taken(wanted) as taking:
            begun = False
            for instance, parts in taking.instances():
                try:
                    reader = Reader(parts, instance.transfer_syntax)
                    found = Describing(reader, f"{wanted.base}{_address(instance)}/bulkdata").dataset()
                except DatasetError as error:
                    # One that breaks the rules must not hide the others: it is named, and no more.
                    log.warning("an instance is described by its UIDs alone: %s", error)
                    found = _named(instance)
                # The syntax the pixels are in, for who asks for frames as they are stored.
                found["00083002"] = {"vr": "UI", "Value": [instance.transfer_syntax]}
                wanted.told.instances += 1
                yield (b"," if begun else b"[") + msgspec.json.encode(found)
                begun = True
            yield b"]"

    # --- Frames

    async def frames(self, request: Request) -> Response:
        """Give frames, as they are stored or decoded."""
        wanted = _Wanted(request, "frames")
        numbers = _numbers(request.path_params["frames"])
        way = _FramesWay(accepted(request), len(numbers))
        return Streamed(self._threads, self._given(wanted, numbers, way), lambda: way.content_type)

    def _given(self, wanted: _Wanted, numbers: list[int], way: _FramesWay) -> Content:
        for turn in turns(numbers):
            with self._taken(wanted) as taking:
                way.choose(taking.manifest.kinds[0].transfer_syntax)
                instance, pixels = _pixels(taking)
                for number, content in pixels.frames(turn):
                    frame = content
                    if pixels.is_encapsulated and way.syntax == EXPLICIT:
                        frame = iter([self._decoded(content, pixels.layout, instance.transfer_syntax)[0]])
                    if way.body is None:
                        yield from frame
                    else:
                        place = f"{wanted.base}{_address(instance)}/frames/{number}"
                        yield from way.body.part(way.part_type, frame, content_location=place)
        wanted.told.instances = 1
        if way.body is not None:
            yield way.body.end()

    def _decoded(self, content: Iterator[Buffer], layout: Layout, syntax: str) -> tuple[bytes, str]:
        with self._heavy:
            return web_render.native(_whole(content), layout, syntax)

    # --- Drawn

    async def rendered(self, request: Request) -> Response:
        """Draw a frame, the first of an instance where none is named."""
        wanted = _Wanted(request, "rendered")
        numbers = _numbers(request.path_params.get("frames", "1"))
        kind = web_accept.rendered(accepted(request))
        if not kind or len(numbers) > 1:
            raise Refusal(406, "a frame at a time is drawn, as image/jpeg or image/png")
        try:
            wished = web_render.wishes(dict(request.query_params))
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        return Streamed(self._threads, self._drawn(wanted, numbers, kind, wished), kind)

    def _drawn(self, wanted: _Wanted, numbers: list[int], kind: str, wished: web_render.Wishes) -> Content:
        with self._taken(wanted) as taking:
            instance, pixels = _pixels(taking)
            layout = pixels.layout
            for _, content in pixels.frames(numbers):
                if pixels.is_encapsulated:
                    samples, colours = self._decoded(content, layout, instance.transfer_syntax)
                else:
                    samples, colours = _whole(content), layout.photometric
                wanted.told.instances = 1
                with self._heavy:
                    drawn = web_render.draw(samples, layout, colours, kind, wished)
                yield drawn

    # --- Bulk data

    async def bulkdata(self, request: Request) -> Response:
        """Give a value that metadata named by its address."""
        wanted = _Wanted(request, "bulkdata")
        try:
            path = path_of(request.path_params["path"])
        except PathError:
            raise Refusal(404, _NOT_HERE) from None
        ranges = [r for r in accepted(request) if r.weight and r.inner in {OCTETS, ANY, "*/*", "application/*"}]
        if not ranges:
            raise Refusal(406, "bulk data is multipart/related of application/octet-stream")
        body = Multipart(OCTETS) if any(r.is_multipart or r.kind == "*/*" for r in ranges) else None
        content_type = OCTETS if body is None else body.content_type
        return Streamed(self._threads, self._bulk(wanted, path, body), content_type)

    def _bulk(self, wanted: _Wanted, path: list[int], body: Multipart | None) -> Content:
        with self._taken(wanted) as taking:
            for instance, parts in taking.instances():
                content = bulk(Reader(parts, instance.transfer_syntax), path)
                first = next(content, None)
                if first is None:
                    raise Refusal(404, _NOT_HERE)
                wanted.told.instances = 1
                whole = itertools.chain([first], content)
                yield from body.part(OCTETS, whole) if body else whole
                if body:
                    yield body.end()
                return

    @contextlib.contextmanager
    def _taken(self, wanted: _Wanted) -> Iterator[Taking]:
        try:
            with self._asking.retrieved(wanted.peer, "web", wanted.address, wanted.selection) as taking:
                yield taking
        except (BrokenError, HandoverError) as error:
            raise AskingError("an instance does not open", FAILED) from error
        except NoFrameError:
            raise Refusal(404, "this instance has no such frame") from None
        except (DatasetError, DrawError) as error:
            raise Refusal(406, str(error)) from None


class _Wanted:
    """What a URL's path names, and who asks."""

    def __init__(self, request: Request, kind: str) -> None:
        self.told: Told = request.state.told
        self.told.kind = kind
        self.peer: str = request.state.peer.ae_title
        self.address: str = request.state.wire.address
        self.base: str = request.state.origin + PREFIX
        names = [request.path_params.get(name) for name in ("study", "series", "instance")]
        if not all(is_uid(name) for name in names if name is not None):
            raise Refusal(400, "the path names something that is no UID")
        self.is_instance = names[2] is not None
        study, series, instance = ([name] if name else [] for name in names)
        self.selection = Selection(studies=study, series=series, instances=instance)


def turns(numbers: Sequence[int]) -> list[list[int]]:
    """Return the ascending runs of a list."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number > found[-1][-1]:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) > FRAMES_LIMIT or not all(p.isascii() and p.isdecimal() and 0 < int(p[:10]) < 1 << 31 for p in parts):
        raise Refusal(400, f"frames are named by their numbers from 1, at most {FRAMES_LIMIT} at a time")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers) or len(turns(numbers)) > TURNS_LIMIT:
        raise Refusal(400, f"a frame is named once, and the list turns back at most {TURNS_LIMIT} times")
    return numbers


def _syntax(stored: str, choices: Sequence[Choice]) -> str:
    """Return the transfer syntax that an instance is given in.

    Raises:
        Refusal: There is none.
    """
    if any(choice.syntax in {ANY, stored} for choice in choices):
        return stored
    can = stored in _NATIVE or (stored in ENCODINGS and web_render.is_decodable(stored))
    found = next((choice.syntax for choice in choices if can and choice.syntax in transcode.TARGETS), "")
    if not found:
        raise Refusal(406, _CANNOT)
    return found


class _FramesWay:
    """How frames are given, which is chosen when it is known how they are stored."""

    def __init__(self, ranges: list[web_accept.Range], count: int) -> None:
        self._ranges = ranges
        self._count = count
        self.body: Multipart | None = None
        self.syntax = self.content_type = self.part_type = ""

    def choose(self, stored: str) -> None:
        """Choose, once.

        Raises:
            Refusal: There is no way that the client accepts.
        """
        if self.syntax:
            return
        choice = next((choice for choice in web_accept.frames(self._ranges, stored) if self._can(choice, stored)), None)
        if choice is None:
            raise Refusal(406, _CANNOT)
        self.syntax = stored if choice.syntax in {ANY, stored} and stored not in _NATIVE else EXPLICIT
        self.part_type = f"{choice.kind};transfer-syntax={self.syntax}"
        self.body = Multipart(choice.kind) if choice.multipart else None
        self.content_type = self.body.content_type if self.body else choice.kind

    def _can(self, choice: Choice, stored: str) -> bool:
        if not choice.multipart and self._count > 1:
            return False
        if stored in _NATIVE:
            return choice.kind == OCTETS and choice.syntax in {ANY, EXPLICIT}
        return choice.syntax in {ANY, stored} or (choice.syntax == EXPLICIT and web_render.is_decodable(stored))


def _pixels(taking: Taking) -> tuple[Instance, Pixels]:
    """Return the one instance of a stream with its pixels; what lies behind a frame is not read."""
    instance, parts = next(taking.instances())
    return instance, Pixels(Reader(parts, instance.transfer_syntax), instance.transfer_syntax)


def _whole(content: Iterator[Buffer]) -> bytes:
    held, length = list[Buffer](), 0
    for piece in content:
        length += len(piece)
        if length > web_render.PIXELS_LIMIT:
            raise DrawError("its frames are too large to be decoded")
        held.append(piece)
    return b"".join(held)


def _named(instance: Instance) -> Described:
    """Describe an instance by what it is called."""
    names = {
        "00080016": instance.sop_class,
        "00080018": instance.sop,
        "0020000D": instance.study,
        "0020000E": instance.series,
    }
    return {tag: {"vr": "UI", "Value": [uid]} for tag, uid in names.items()}


def _address(instance: Instance) -> str:
    return f"/studies/{instance.study}/series/{instance.series}/instances/{instance.sop}"
