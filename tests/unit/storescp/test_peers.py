"""Peers: who may associate is decided by title and certificate, from files that are read whole or not at all."""

from __future__ import annotations

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keys import authority
from storescp import peers
from storescp.config import is_ae_title
from storescp.peers import Asked, Peer, PeerError, PeerFile, Peers, Proof

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
CA = authority.new_authority("00" * 16, datetime.now(UTC))


def certificate(name: str) -> str:
    request = authority.request(authority.new_private_key())
    return authority.issue_peer(CA, request, name, datetime.now(UTC), 30).decode()


ONE, TWO, THREE = (certificate(name) for name in ("one", "two", "three"))
PRINTS = {
    pem: x509.load_pem_x509_certificate(pem.encode()).fingerprint(hashes.SHA256()).hex() for pem in (ONE, TWO, THREE)
}
FILE = Path("peers.d/CT1.toml")


def rendered(title: str = "CT1", *pems: str, description: str = "", classes: tuple[str, ...] = ()) -> str:
    return peers.render(
        PeerFile(
            ae_title=title,
            description=description,
            certificates=list(pems or [ONE]),
            private_sop_classes=list(classes),
        )
    )


def write(folder: Path, title: str, *pems: str, name: str = "") -> Path:
    file = folder / (name or peers.file_name(title))
    file.write_text(rendered(title, *pems))
    return file


def asked(pem: str, calling: bytes = b"CT1", called: bytes = b"STRONGROOM") -> Asked:
    return Asked(calling, called, "127.0.0.1", Proof(PRINTS.get(pem, "")))


# --- the decision

NO_PEER = "no peer has this calling AE title"
NO_CERTIFICATE = "the certificate is not one of the peer with this calling AE title"
NOT_CALLED = "the called AE title is not this server's"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    folder = tmp_path_factory.mktemp("peers")
    write(folder, "CT1", ONE)
    write(folder, "MR 1", TWO, THREE)
    write(folder, "ct1", THREE)
    write(folder, "SIXTEEN-LETTERS!", ONE)
    return peers.read_all(folder)


@pytest.mark.parametrize(
    ("calling", "called", "pem", "decision"),
    [
        (b"CT1             ", b"STRONGROOM      ", ONE, "CT1"),
        (b"CT1", b"STRONGROOM", ONE, "CT1"),
        (b"   CT1          ", b"    STRONGROOM  ", ONE, "CT1"),
        (b"MR 1            ", b"STRONGROOM      ", TWO, "MR 1"),
        (b"MR 1            ", b"STRONGROOM      ", THREE, "MR 1"),
        (b"ct1             ", b"STRONGROOM      ", THREE, "ct1"),
        (b"SIXTEEN-LETTERS!", b"STRONGROOM      ", ONE, "SIXTEEN-LETTERS!"),
        (b"CT1             ", b"STRONGROOM      ", TWO, NO_CERTIFICATE),
        (b"MR 1            ", b"STRONGROOM      ", ONE, NO_CERTIFICATE),
        (b"ct1             ", b"STRONGROOM      ", ONE, NO_CERTIFICATE),
        (b"CT1             ", b"STRONGROOM      ", "", NO_CERTIFICATE),
        (b"CT1             ", b"OTHER           ", TWO, NO_CERTIFICATE),
        (b"CT2             ", b"STRONGROOM      ", ONE, NO_PEER),
        (b"Ct1             ", b"STRONGROOM      ", ONE, NO_PEER),
        (b"MR1             ", b"STRONGROOM      ", TWO, NO_PEER),
        (b"MR  1           ", b"STRONGROOM      ", TWO, NO_PEER),
        (b"                ", b"STRONGROOM      ", ONE, NO_PEER),
        (b"", b"STRONGROOM      ", ONE, NO_PEER),
        (b"CT1\0            ", b"STRONGROOM      ", ONE, NO_PEER),
        (b"CT1\n            ", b"STRONGROOM      ", ONE, NO_PEER),
        (b"CT\xb1             ", b"STRONGROOM      ", ONE, NO_PEER),
        (b"\xff" * 16, b"STRONGROOM      ", ONE, NO_PEER),
        (b"*               ", b"STRONGROOM      ", ONE, NO_PEER),
        (b"CT1             ", b"strongroom      ", ONE, NOT_CALLED),
        (b"CT1             ", b"STRONGROOM2     ", ONE, NOT_CALLED),
        (b"CT1             ", b"                ", ONE, NOT_CALLED),
        (b"CT1             ", b"STRONGROOM\0     ", ONE, NOT_CALLED),
        (b"CT1             ", b"\xff" * 16, ONE, NOT_CALLED),
    ],
)
def test_title_and_certificate_decide(known: Peers, calling: bytes, called: bytes, pem: str, decision: str) -> None:
    found = known.decide(asked(pem, calling, called), "STRONGROOM")
    assert (found.ae_title if isinstance(found, Peer) else found) == decision


def test_without_peers_nobody_is_let_in() -> None:
    assert Peers({}).decide(asked(ONE), "STRONGROOM") == NO_PEER


def test_the_servers_own_title_counts_without_its_padding(known: Peers) -> None:
    assert isinstance(known.decide(asked(ONE, called=b" STRONG ROOM "), "STRONG ROOM "), Peer)


def loaded(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def one_peer(content: str) -> Peers:
    peer = peers.parse(content, FILE)
    return Peers({peer.ae_title: peer})


NAMED = "dns:ct1.example"
AUTHORITY = peers.key_print(loaded(CA.certificate))
OTHER_PRINT = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("bound", "proof", "accepted"),
    [
        (f'keys = ["{peers.key_print(loaded(ONE))}"]', Proof("f", peers.key_print(loaded(ONE))), True),
        (f'keys = ["{peers.key_print(loaded(ONE))}"]', Proof("f", peers.key_print(loaded(TWO))), False),
        (f'keys = ["{OTHER_PRINT}"]', Proof("f", ""), False),
        (f'names = ["{NAMED}"]', Proof("f", "k", frozenset({NAMED}), frozenset({AUTHORITY})), True),
        (f'names = ["{NAMED}"]', Proof("f", "k", frozenset({NAMED, "ip:10.0.0.1"}), frozenset({"x", AUTHORITY})), True),
        # Another name, another authority, and a chain that ends in a peer's own certificate.
        (f'names = ["{NAMED}"]', Proof("f", "k", frozenset({"dns:ct2.example"}), frozenset({AUTHORITY})), False),
        (f'names = ["{NAMED}"]', Proof("f", "k", frozenset({NAMED}), frozenset({OTHER_PRINT})), False),
        (f'names = ["{NAMED}"]', Proof("f", "k", frozenset({NAMED})), False),
    ],
    ids=[
        "key",
        "another key",
        "no key",
        "name",
        "name among others",
        "another name",
        "another authority",
        "no authority",
    ],
)
def test_a_key_or_a_name_of_an_authority_binds(bound: str, proof: Proof, accepted: bool) -> None:
    known = one_peer(f'ae_title = "CT1"\nauthority = "{AUTHORITY}"\n{bound}\n')
    decision = known.decide(Asked(b"CT1", b"STRONGROOM", "10.0.0.1", proof), "STRONGROOM")
    assert (isinstance(decision, Peer)) == accepted
    assert accepted or decision == NO_CERTIFICATE


@pytest.mark.parametrize(
    ("networks", "address", "accepted"),
    [
        (["10.1.2.3"], "10.1.2.3", True),
        (["10.1.2.3"], "10.1.2.4", False),
        (["10.9.0.0/16", "10.1.2.0/24"], "10.1.2.255", True),
        (["10.1.2.0/24"], "10.1.3.0", False),
        (["fd00::/8"], "fd12::1", True),
        (["fd00::/8"], "fe80::1", False),
        (["fd00::/8"], "10.1.2.3", False),
        (["0.0.0.0/0"], "::ffff:10.1.2.3", False),
        ([], "192.0.2.1", True),
    ],
)
def test_an_address_is_needed_where_addresses_are_given(networks: list[str], address: str, accepted: bool) -> None:
    known = one_peer(peers.render(PeerFile(ae_title="CT1", certificates=[ONE], addresses=networks)))
    decision = known.decide(Asked(b"CT1", b"STRONGROOM", address, Proof(PRINTS[ONE])), "STRONGROOM")
    assert isinstance(decision, Peer) == accepted
    assert accepted or decision == "the peer with this calling AE title may not come from this address"


@pytest.mark.parametrize(
    ("plaintext", "listener", "accepted"),
    [(True, {"CT1"}, True), (True, {"CT2"}, False), (True, set(), False), (False, {"CT1"}, False)],
)
def test_without_tls_both_the_peer_and_the_listener_must_say_so(
    plaintext: bool, listener: set[str], accepted: bool
) -> None:
    known = one_peer(peers.render(PeerFile(ae_title="CT1", certificates=[ONE], plaintext=plaintext)))
    decision = known.decide(Asked(b"CT1", b"STRONGROOM", "10.0.0.1", None, frozenset(listener)), "STRONGROOM")
    assert isinstance(decision, Peer) == accepted


def test_a_peer_without_tls_needs_its_certificate_where_there_is_tls() -> None:
    known = one_peer(peers.render(PeerFile(ae_title="CT1", certificates=[ONE], plaintext=True)))
    asked_for = Asked(b"CT1", b"STRONGROOM", "10.0.0.1", Proof(PRINTS[TWO]), frozenset({"CT1"}))
    assert known.decide(asked_for, "STRONGROOM") == NO_CERTIFICATE


def test_alternative_names_are_those_of_the_certificate() -> None:
    names = ["CT1.example", "10.1.2.3", "fd00::5"]
    pem = authority.issue_server(CA, authority.request(authority.new_private_key()), names, datetime.now(UTC), 9)
    assert peers.alternative_names(loaded(pem.decode())) >= {"dns:ct1.example", "ip:10.1.2.3", "ip:fd00::5"}
    assert not peers.alternative_names(loaded(CA.certificate))


# --- files


def test_a_peer_file_is_read_as_it_was_written() -> None:
    content = rendered("CT 1", ONE, TWO, description='The "CT"\\\n☢ \x7f', classes=("1.2.3", "2.25.4"))
    found = peers.parse(content, FILE)
    assert (found.ae_title, found.description, found.file) == ("CT 1", 'The "CT"\\\n☢ \x7f', FILE)
    assert found.fingerprints == {PRINTS[ONE], PRINTS[TWO]}
    assert [PRINTS[pem] for pem in (ONE, TWO)] == [peers.fingerprint(pem) for pem in found.certificates]
    assert found.private_sop_classes == {"1.2.3", "2.25.4"}


titles = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\"), min_size=1, max_size=16)
titles = titles.filter(lambda title: title.strip(" "))


@QUICK
@given(titles, st.text(max_size=30), st.lists(st.sampled_from([ONE, TWO, THREE]), min_size=1, max_size=3))
@example("a", '"""\\\r\n\0\U0010ffff', [ONE])
def test_any_peer_is_read_as_it_was_written(title: str, description: str, pems: list[str]) -> None:
    found = peers.parse(rendered(title, *pems, description=description), FILE)
    assert (found.ae_title, found.description) == (title.strip(" "), description)
    assert found.fingerprints == {PRINTS[pem] for pem in pems}


GOOD = rendered()


def with_line(key: str, value: str) -> str:
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key} = ")]
    return f"{key} = {value}\n" + "\n".join(lines) if key != "certificates" else f"ae_title = 'CT1'\n{key} = {value}"


def version_two(pem: str) -> str:
    """Return a certificate that says it is of version 2, which X.509 has but nobody issues."""
    der = x509.load_pem_x509_certificate(pem.encode()).public_bytes(serialization.Encoding.DER)
    assert bytes.fromhex("a003020102") in der
    return ssl.DER_cert_to_PEM_cert(der.replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020101"), 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "ae_title: missing"),
        ("ae_title = 'CT1'", "certificates: a peer needs one"),
        (with_line("keys", "['sha256:00']"), "keys: 'sha256:00' is not"),
        (with_line("names", "['dns:a']"), "authority: '' is not"),
        (with_line("names", "['ct1']"), "names: 'ct1' is no name"),
        (with_line("authority", "'x'"), "authority: 'x' is not"),
        *((with_line("addresses", f"['{a}']"), f"addresses: '{a}' is no")
          for a in ("", "x", "10.1.2.3/8", "10.1.2.3:104")),
        (with_line("operations", "['delete']"), "operations: 'delete' is none of echo, store"),
        (with_line("sop_classes", "['CT']"), "sop_classes: 'CT' is no UID"),
        (with_line("maximum_associations", "-1"), "maximum_associations: must be from 0"),
        (with_line("objects_per_minute", "1000001"), "objects_per_minute: must be from 0"),
        (with_line("bytes_per_day", "2e9"), "bytes_per_day: expected `int`"),
        (with_line("plaintext", "'yes'"), "plaintext: expected `bool`"),
        (GOOD + "x", ""),
        ("ae_title = ", ""),
        ("a = " + "[" * 5000, ""),
        ("a = " + "1" * 5000, ""),
        (GOOD + "\nae_title = 'CT2'", ""),
        ("unknown = 1\n" + GOOD, "unknown: unknown key"),
        (with_line("ae_title", "1"), "ae_title: expected `str`, got `int`"),
        *((with_line("ae_title", f'"{t}"'), "ae_title: must be 1 to 16 characters, ASCII, no backslash")
          for t in ("", "  ", "x" * 17, "a\\\\b", "é", "a\\tb")),
        (with_line("description", "['x']"), "description: expected `str`, got `array`"),
        *((with_line("private_sop_classes", f"['{uid}']"), f"private_sop_classes: '{uid}' is no UID")
          for uid in ("", "1.", "x", "1.2 ", "1" * 65)),
        (with_line("certificates", "[]"), "certificates: a peer needs one"),
        *((with_line("certificates", f'["""{pem}"""]'), "certificates: ") for pem in (
            "", "x", ONE[:-60], ONE.replace("CERTIFICATE", "KEY"), ONE.replace("M", "!", 1),
            authority.private_pem(authority.new_private_key()).decode(), version_two(ONE), "é",
        )),
        (with_line("certificates", f'["""{ONE}""", "x"]'), "certificates: "),
    ],
)  # fmt: skip
def test_a_broken_file_is_an_error_that_names_file_and_key(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(PeerError) as raised:
        peers.parse(content, FILE)
    assert f"{FILE}: {message}" in str(raised.value)
    file = tmp_path / "CT1.toml"
    file.write_text(content)
    for read in (lambda: peers.read(file), lambda: peers.read_all(tmp_path)):
        with pytest.raises(PeerError) as raised:
            read()
        assert f"{file}: {message}" in str(raised.value)


def test_every_error_of_a_file_is_told_at_once() -> None:
    with pytest.raises(PeerError) as raised:
        peers.parse("ae_title = 1\ndescription = 2\nother = 3", FILE)
    assert len(str(raised.value).split("\n")) == 3


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "b.toml").mkdir()
    (tmp_path / "c.toml").symlink_to(tmp_path / "missing")
    for name in "abc":
        with pytest.raises(PeerError, match=f"{name}.toml: "):
            peers.read(tmp_path / f"{name}.toml")
    with pytest.raises(PeerError) as raised:
        peers.read_all(tmp_path)
    assert [line.split(".toml: ")[0][-1] for line in str(raised.value).split("\n")] == ["a", "b", "c"]


documents = st.lists(
    st.tuples(
        st.sampled_from(["ae_title", "description", "certificates", "private_sop_classes", "other"]),
        st.sampled_from(
            ["1", "'x'", "[]", "['1.2']", "[1]", "{}", "1979-05-27", "nan", f"['''{ONE}''']", "['''x''']", "'é'"]
        ),
    ),
    max_size=5,
).map(lambda lines: "\n".join(f"{key} = {value}" for key, value in lines))


@QUICK
@given(st.one_of(st.text(max_size=60), documents, documents.map(lambda d: GOOD + d)))
@example(GOOD)
def test_any_text_is_a_peer_or_a_peer_error(content: str) -> None:
    try:
        found = peers.parse(content, FILE)
    except PeerError as error:
        assert all(line.startswith(str(FILE)) for line in str(error).split("\n") if line)
        return
    assert is_ae_title(found.ae_title)
    assert found.fingerprints <= set(PRINTS.values())
    assert found.fingerprints or found.plaintext


# --- folders


def test_a_folder_gives_its_peers_by_title(tmp_path: Path) -> None:
    assert peers.read_all(tmp_path) == Peers({})
    write(tmp_path, "MR1", TWO)
    write(tmp_path, "CT1", ONE, name="any.toml")
    (tmp_path / "CT2.toml.bak").write_text("broken")
    (tmp_path / "README").write_text("broken")
    found = peers.read_all(tmp_path)
    assert {title: peer.file.name for title, peer in found.by_title.items()} == {"CT1": "any.toml", "MR1": "MR1.toml"}


def test_two_files_with_one_title_are_an_error_that_names_both(tmp_path: Path) -> None:
    one, other = write(tmp_path, "CT1", ONE), write(tmp_path, "CT1", TWO, name="b.toml")
    write(tmp_path, " CT1 ", THREE, name="c.toml")
    write(tmp_path, "MR1", TWO)
    with pytest.raises(PeerError) as raised:
        peers.read_all(tmp_path)
    assert str(raised.value).split("\n") == [
        f"{other}: ae_title: also in {one}",
        f"{tmp_path / 'c.toml'}: ae_title: also in {one}",
    ]


def test_one_broken_file_keeps_all_others_from_being_taken(tmp_path: Path) -> None:
    write(tmp_path, "MR1", TWO)
    for name in ("a.toml", "z.toml"):
        (tmp_path / name).write_text("broken")
    with pytest.raises(PeerError) as raised:
        peers.read_all(tmp_path)
    assert [line.split(": ")[0] for line in str(raised.value).split("\n")] == [
        str(tmp_path / "a.toml"),
        str(tmp_path / "z.toml"),
    ]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("CT1", "CT1.toml"),
        ("A B", "A%20B.toml"),
        ("a/b", "a%2Fb.toml"),
        ("../../etc", "..%2F..%2Fetc.toml"),
        (".", "..toml"),
        ("..", "...toml"),
        ("%2F", "%252F.toml"),
        ("~!*?[]", "~%21%2A%3F%5B%5D.toml"),
    ],
)
def test_a_title_gives_a_name_in_the_folder_and_is_found_there(tmp_path: Path, title: str, name: str) -> None:
    assert peers.file_name(title) == name
    file = write(tmp_path, title)
    assert os.listdir(tmp_path) == [name]
    assert peers.read_all(tmp_path).by_title[title].file == file
    assert [entry[0] for entry in peers.stamp(tmp_path)] == [name]


@QUICK
@given(titles, titles)
@example("/", "%2F")
@example("a", "a ")
def test_no_two_titles_share_a_name_and_none_leaves_the_folder(one: str, other: str) -> None:
    assert (peers.file_name(one) == peers.file_name(other)) == (one == other)
    assert Path("peers.d", peers.file_name(one)).resolve().parent == Path("peers.d").resolve()
    assert len(peers.file_name(one)) <= 3 * 16 + 5


def test_the_stamp_of_a_folder_changes_when_a_peer_does(tmp_path: Path) -> None:
    assert peers.stamp(tmp_path) == peers.stamp(tmp_path / "missing") == ()
    seen = {peers.stamp(tmp_path)}
    file = write(tmp_path, "CT1")
    os.utime(file, ns=(1, 1))
    seen.add(peers.stamp(tmp_path))
    os.utime(file, ns=(2, 2))
    seen.add(peers.stamp(tmp_path))
    file.write_text(rendered("CT1", ONE, TWO))
    os.utime(file, ns=(2, 2))
    seen.add(peers.stamp(tmp_path))
    file.rename(tmp_path / "other.toml")
    seen.add(peers.stamp(tmp_path))
    assert len(seen) == 5
    before = peers.stamp(tmp_path)
    (tmp_path / "other.txt").touch()
    assert peers.stamp(tmp_path) == before
