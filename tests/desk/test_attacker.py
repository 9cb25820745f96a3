"""A desk that is broken into, as its own user: it gets what the vault grants a peer by name, and nothing else."""

from __future__ import annotations

import contextlib
import json
import pwd
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import scu
from conftest import send
from pydicom.data import get_testdata_file
from served import STUDY_ROOT, Desk, Received, find, get_contexts, identifier, last, models, three_users
from users import DESK, GATE, OTHER, VAULT, being

from storage.query import Query
from storage.selection import Selection
from storescp import config as configuration
from storescp.control import Client
from storescp.desk.asking import Asking, AskingError
from storescp.errors import StrongroomError

CT, MR = (Path(str(get_testdata_file(name))) for name in ("CT_small.dcm", "MR_small.dcm"))
STUDY, PATIENT = "0020000D", "00100020"

pytestmark = [
    pytest.mark.needs_root,
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def three() -> Iterator[Desk]:
    """A server whose gate, vault and desk are three users, and what it holds."""
    with three_users() as server:
        server.peer("CT1")
        server.peer("MR1")
        server.peer("FINDS", "find")
        server.peer("GETS", "get")
        server.peer("MOVES", "move")
        server.peer("ALL", "find", "get", "move")
        server.peer("OFMR1", "find", "get", "move", sees_ae_titles=["MR1"])
        server.peer("OFCT", "find", "get", "move", sees_modalities=["CT"])
        server.peer("READER", roles=["reader"])
        server.peer("SENDER", roles=["sender"])
        server.peer("ADMIN", roles=["admin"], sees_ae_titles=["MR1"])
        server.open()
        assert send(server, [CT]) == [0]
        assert send(server, [MR], "MR1") == [0]
        server.wait_admitted()
        yield server
        assert server.stop() == 0


@pytest.fixture
def asking(three: Desk) -> Asking:
    return Asking(configuration.load(three.config).desk_socket)


def uid_of(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def test_gate_vault_and_desk_are_three_users_and_the_desk_answers(three: Desk) -> None:
    owners = {verb: {uid_of(pid) for pid in three.pids(verb)} for verb in ("vault", "gate", "desk")}
    assert owners == {
        verb: {pwd.getpwnam(name).pw_uid} for verb, name in (("vault", VAULT), ("gate", GATE), ("desk", DESK))
    }
    item, received = scu.read(CT), Received()
    contexts, roles = get_contexts((item.sop_class, item.transfer_syntax))
    with three.ask("ALL", [*contexts, *models(1)], roles=roles, handlers=[received.handler]) as association:
        asked = identifier("STUDY", StudyInstanceUID=item.study)
        assert len(find(association, asked)[0]) == 1
        assert last(association.send_c_get(asked, STUDY_ROOT + "3"))[0].Status == 0
    assert [one.data for one in received] == [item.data]


def test_the_desks_user_reads_nothing_of_the_store_and_writes_nowhere_in_it(three: Desk) -> None:
    config = configuration.load(three.config)
    places = [
        three.store,
        three.incoming,
        config.anchors,
        config.keyring,
        config.socket.parent,
        three.home / "tls" / "server.key",
    ]
    files = [path for place in places for path in ([place, *place.rglob("*")] if place.is_dir() else [place])]
    assert len(files) > 15
    opened, made = [], []
    with being(DESK):
        for path in files:
            try:
                if path.is_dir():
                    if list(path.iterdir()):
                        opened.append(path)
                    made.append((path / "x").touch())
                else:
                    path.read_bytes()
                    opened.append(path)
            except PermissionError:
                continue
            except OSError as error:
                # A socket is no file.
                assert path.is_socket(), (path, error)
        for path in files:
            with contextlib.suppress(PermissionError, IsADirectoryError), path.open("r+b"):
                made.append(path)
    assert opened == []
    assert made == []


def test_the_desks_user_gets_nothing_on_the_vaults_own_socket_and_others_nothing_on_the_desks(three: Desk) -> None:
    config = configuration.load(three.config)

    def outcome(user: str, path: Path, method: str, place: str) -> str:
        with being(user), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            try:
                connection.connect(str(path))
                Client(connection).json(method, place)
            except PermissionError:
                return "closed"
            except StrongroomError as error:
                return str(error)
        return "answered"

    for path, method, place in ((config.socket, "GET", "/v1/status"), (config.desk_socket, "GET", "/v1/locked")):
        for user in (GATE, OTHER, "nobody"):
            assert outcome(user, path, method, place) in {"closed", "the connection to the vault broke off"}
    assert outcome(DESK, config.socket, "GET", "/v1/status") in {"closed", "the connection to the vault broke off"}
    assert outcome(DESK, config.desk_socket, "GET", "/v1/locked") == "answered"


def test_on_its_own_socket_the_desk_may_ask_five_things_and_no_other(three: Desk) -> None:
    config = configuration.load(three.config)
    every = [
        *(("GET", f"/v1/{name}") for name in ("status", "keys", "audit", "jobs", "quarantine", "", "../v1/status")),
        *(("POST", f"/v1/{name}") for name in ("unlock", "lock", "search", "export", "erase", "retrieve/", "find?x=1")),
        ("DELETE", "/v1/retrieve"), ("GET", "/v1/retrieve"), ("POST", "/v1/locked"), ("PUT", "/v1/find"),
    ]  # fmt: skip
    for method, place in every:
        with being(DESK), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(config.desk_socket))
            with pytest.raises(StrongroomError, match="the desk may not ask for"):
                Client(connection).json(method, place, {} if method != "GET" else None)


OPERATIONS = ("find", "get", "move", "web")
# Who may what, and what of the two studies they see.
MAY: dict[str, tuple[set[str], set[str]]] = {
    "CT1": (set(), set()),
    "FINDS": ({"find"}, {"CT", "MR"}),
    "GETS": ({"get"}, {"CT", "MR"}),
    "MOVES": ({"move"}, {"CT", "MR"}),
    "ALL": ({"find", "get", "move"}, {"CT", "MR"}),
    "OFMR1": ({"find", "get", "move"}, {"MR"}),
    "OFCT": ({"find", "get", "move"}, {"CT"}),
    "READER": ({"web"}, {"CT", "MR"}),
    "SENDER": (set(), set()),
    "ADMIN": ({"web"}, {"CT", "MR"}),
    "NOBODY": (set(), set()),
    "": (set(), set()),
}


def outcome(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except AskingError as error:
        return str(error)


@pytest.mark.parametrize("title", MAY)
def test_who_may_what_and_of_which_instances(asking: Asking, title: str) -> None:
    items = {"CT": scu.read(CT), "MR": scu.read(MR)}
    studies = {item.study: name for name, item in items.items()}
    operations, seen = MAY[title]

    def finds(operation: str) -> set[str]:
        with asking.found(title, operation, Query("STUDY", {STUDY: []})) as rows:
            return {studies[row[STUDY][0]] for row in rows}

    def gets(operation: str, **chosen: list[str]) -> set[str]:
        with asking.retrieved(title, operation, "TO", Selection(**chosen)) as taking:
            found = {studies[one.study]: b"".join(parts) for one, parts in taking.instances()}
            assert all(content == items[name].data for name, content in found.items())
            return set(found)

    refused = "this peer may not do that"
    nothing = "nothing that this peer sees matches"
    with being(DESK):
        for operation in OPERATIONS:
            if operation not in operations:
                assert outcome(lambda o=operation: finds(o)) == refused  # type: ignore[misc]
                assert outcome(lambda o=operation: gets(o, studies=list(studies))) == refused  # type: ignore[misc]
                continue
            assert finds(operation) == seen
            assert gets(operation, studies=list(studies)) == seen
            for name, item in items.items():
                expected = {name} if name in seen else nothing
                for chosen in (
                    {"studies": [item.study]},
                    {"series": [item.series]},
                    {"instances": [item.sop_instance]},
                    {"patients": ["1CT1" if name == "CT" else "4MR1"]},
                ):
                    assert outcome(lambda o=operation, c=chosen: gets(o, **c)) == expected  # type: ignore[misc]
            assert outcome(lambda o=operation: gets(o, studies=["1.2.3"])) == nothing  # type: ignore[misc]


@pytest.mark.parametrize("operation", ["", "store", "commit", "echo", "admin", "FIND", "find\n"])
def test_no_other_word_is_an_operation(asking: Asking, operation: str) -> None:
    with being(DESK), pytest.raises(AskingError, match="this peer may not do that"):
        asking.found("ALL", operation, Query("STUDY", {})).__enter__()


@pytest.mark.parametrize(
    ("place", "document"),
    [
        ("find", {}),
        ("find", {"peer": "ALL", "operation": "find", "query": {"level": "STUDY", "match": {}}, "scope": {}}),
        ("find", {"peer": "ALL", "operation": "find", "query": {"level": "STUDY", "match": {}, "scope": {}}}),
        ("find", {"peer": "ALL", "operation": "find", "query": {"level": "NONE", "match": {}}}),
        ("find", {"peer": "ALL", "operation": "find", "query": {"level": "STUDY", "match": {"x": []}}}),
        ("find", {"peer": "ALL", "operation": "find", "query": {"level": "STUDY", "match": {STUDY: ["';--"]}}}),
        ("find", {"peer": ["ALL"], "operation": "find", "query": {"level": "STUDY", "match": {}}}),
        ("retrieve", {"peer": "ALL", "operation": "get", "to": "A", "selection": {}}),
        ("retrieve", {"peer": "ALL", "operation": "get", "to": "A", "selection": {"scope": []}}),
        ("retrieve", {"peer": "ALL", "operation": "get", "to": "A", "selection": {"studies": ["1.2"] * 10_001}}),
        ("retrieve", {"peer": "ALL", "operation": "get", "selection": {"studies": ["1.2"]}}),
        ("retrieve", {"peer": "ALL", "operation": "get", "to": "A", "selection": {"studies": [None]}}),
        ("commitments/told", {"id": "CT1/1.2.3", "delivered": True}),
        ("commitments/told", {"id": 1}),
    ],
)
def test_a_request_of_another_shape_is_refused(three: Desk, place: str, document: Any) -> None:
    config = configuration.load(three.config)
    with being(DESK), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(config.desk_socket))
        with pytest.raises(StrongroomError) as refused:
            Client(connection).json("POST", f"/v1/{place}", document)
    assert "error of its own" not in str(refused.value)


def test_every_request_is_in_the_chain_with_the_desks_user_and_the_refused_ones_too(
    three: Desk, asking: Asking
) -> None:
    item = scu.read(CT)
    with being(DESK):
        with asking.found("ALL", "find", Query("STUDY", {PATIENT: ["1CT1"]})) as rows:
            assert len(list(rows)) == 1
        with asking.retrieved("ALL", "get", "WHERE", Selection(studies=[item.study])) as taking:
            # It is recorded before a byte is given: nothing of the instances was read yet.
            assert taking.manifest.instances == 1
    with contextlib.suppress(AskingError), being(DESK):
        asking.found("NOBODY", "find", Query("STUDY", {})).__enter__()
    lines = three.ok("audit", "show", "--json").out.splitlines()
    records = [json.loads(line) for line in lines]
    uid = pwd.getpwnam(DESK).pw_uid
    [query] = [r for r in records if r["type"] == "query" and r.get("filters") == {PATIENT: ["1CT1"]}]
    assert (query["peer"], query["uid"], query["level"]) == ("ALL", uid, "study")
    begun = [r for r in records if r["type"] == "export-begun" and r["to"] == "WHERE"]
    assert [(r["peer"], r["by"], r["study"], r["uid"]) for r in begun] == [("ALL", "get", item.study, uid)]
    refused = [r for r in records if r["type"] == "desk-refused"]
    # Of a peer that there is not, no name: whoever asks would write into the chain what he likes.
    assert any({"peer": "unknown", "operation": "find", "times": 1}.items() <= r.items() for r in refused)
    assert {r["peer"] for r in refused} <= {*MAY, "unknown"} - {"", "NOBODY"}
    assert len(refused) < 60
    assert three.run("audit", "verify").status == 0


def test_what_the_desk_says_of_where_it_goes_cannot_grow_the_chain_without_bound(three: Desk, asking: Asking) -> None:
    item = scu.read(CT)
    with being(DESK), asking.retrieved("ALL", "get", "X" * 100_000, Selection(studies=[item.study])) as taking:
        assert taking.manifest.instances == 1
    last_one = json.loads(three.ok("audit", "show", "--json").out.splitlines()[-2])
    assert len(msgspec.json.encode(last_one)) < 2000
