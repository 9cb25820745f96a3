"""Practices of the installation: its users and files, what it serves, whom it lets in, whom it tells. Pure."""

from __future__ import annotations

from datetime import timedelta

from storescp.config import network
from storescp.doctor.facts import Ending, Facts, Unseen, see
from storescp.doctor.findings import ADVICE, CRITICAL, OK, UNKNOWN, WARNING
from storescp.doctor.practice import Practice, Verdict, days, some
from storescp.errors import plural
from storescp.patch.settings import duration

_CERTIFICATE, _LIST = timedelta(days=30), timedelta(days=7)
# More addresses than these for a listener without TLS are no device any more.
_WIDE = 256
_RSA, _EC = 2048, 256
_FORWARDERS = {
    *("rsyslogd", "syslog-ng", "systemd-journal-upload", "fluent-bit", "fluentd", "vector"),
    *("filebeat", "promtail", "alloy", "splunkd", "nxlog", "auditbeat"),
}


def _modes(facts: Facts) -> Verdict:
    if found := see(facts.store.modes):
        mend = "chown and chmod as each line says; 'strongroom serve' refuses most of these, too"
        return Verdict(CRITICAL, "; ".join(found), mend)
    return Verdict(OK, "owners and modes are as they should be")


def _users(facts: Facts) -> Verdict:
    user, desk = facts.store.settings.gate.user, facts.store.settings.desk
    if user and desk.runs and desk.user in {"", user}:
        found = "the desk has no user of its own: who takes it over can reach what gate or vault can"
        return Verdict(WARNING, found, 'desk.user = "strongroom-desk" in strongroom.toml (docs/desk.md)')
    if user:
        others = f", and the desk as {desk.user}" if desk.runs else ""
        return Verdict(OK, f"the gate runs as {user}{others}, apart from the vault")
    mend = "'strongroom init --vault-user strongroom-vault --gate-user strongroom-gate' for a new store (docs/admin.md)"
    return Verdict(WARNING, "gate and vault run as one user: who takes over the gate can read the archive", mend)


def _plaintext(facts: Facts) -> Verdict:
    listeners = facts.store.settings.gate.plaintext
    titles = [p.ae_title for p in see(facts.store.peers) if p.plaintext]
    if not listeners:
        if titles:
            mend = f"'strongroom peer remove {titles[0]}', and 'strongroom peer add {titles[0]}' with a certificate"
            return Verdict(ADVICE, f"no listener without TLS, but peers that may use one: {some(titles)}", mend)
        return Verdict(OK, "no listener without TLS")
    mend = "a TLS gateway beside the device (docs/admin.md), then take the listener out of gate.plaintext"
    wide = [one.listen for one in listeners if sum(network(text).num_addresses for text in one.addresses) > _WIDE]
    if wide:
        return Verdict(CRITICAL, f"WITHOUT TLS for more than {_WIDE} addresses: {some(wide)}", mend)
    said = [f"{one.listen} for {', '.join(one.peers)}: {one.plaintext}" for one in listeners]
    return Verdict(WARNING, f"WITHOUT TLS: {some(said)}", mend)


def _tls(facts: Facts) -> Verdict:
    found = see(facts.store.tls)
    problems = []
    if found.minimum not in {"TLSv1_2", "TLSv1_3"}:
        problems.append(f"the lowest version is {found.minimum}")
    weak = [s for s in found.suites if not s.startswith("TLS_") and not ("ECDHE" in s and "GCM" in s)]
    if weak:
        problems.append(f"suites without forward secrecy or AES-GCM: {some(weak)}")
    if not found.client_certificates:
        problems.append("no client certificate is asked for")
    if found.bits and found.bits < (_RSA if found.key == "RSA" else _EC):
        problems.append(f"the certificate's key is {found.key} of {found.bits} bits")
    if found.signature in {"md5", "sha1"}:
        problems.append(f"the certificate is signed with {found.signature.upper()}")
    if problems:
        mend = "issue a certificate with an EC P-256 or RSA 3072 key and SHA-256, and put it at gate.certificate"
        return Verdict(CRITICAL, "; ".join(problems), mend)
    key = f"{found.key} {found.bits}".replace(" 0", "")
    return Verdict(OK, f"TLS 1.2 and 1.3, ECDHE with AES-GCM, client certificates required; certificate {key}")


def _peers(facts: Facts) -> Verdict:
    peers = see(facts.store.peers)
    if facts.store.peer_faults:
        return Verdict(
            WARNING, f"peer files that are not read: {some(list(facts.store.peer_faults))}", "strongroom peer list"
        )
    if loose := [peer.ae_title for peer in peers if not peer.pinned and not peer.plaintext]:
        mend = f"'strongroom peer renew {loose[0]}', or a certificate or key in its file and no names"
        return Verdict(WARNING, f"not bound to a certificate or key, but to a name: {some(loose)}", mend)
    if anywhere := [peer.ae_title for peer in peers if not peer.addresses]:
        mend = 'addresses = ["10.1.2.3"] in its file in peers.d'
        return Verdict(ADVICE, f"bound to a certificate, but may come from any address: {some(anywhere)}", mend)
    if not peers:
        return Verdict(OK, "no peers: nobody can associate")
    return Verdict(OK, f"{plural(len(peers), 'peer')}, each bound to a certificate or key and to addresses")


def _expiring(facts: Facts) -> Verdict:
    seen = [(e, e.ends) for e in see(facts.store.endings) if not isinstance(e.ends, Unseen)]
    dark = [f"{e.name}: {e.ends.reason}" for e in see(facts.store.endings) if isinstance(e.ends, Unseen)]
    left = [(e, ends - facts.now) for e, ends in seen]
    mend = "'strongroom peer renew TITLE' for a peer; else a new one from its authority, in the same file"
    if gone := [f"{e.name} {days(-rest)} ago" for e, rest in left if rest < timedelta(0)]:
        return Verdict(CRITICAL, f"HAS EXPIRED: {some(gone)}", mend)
    if soon := [f"{e.name} in {days(rest)}" for e, rest in left if rest < _limit(e)]:
        return Verdict(WARNING, f"ends soon: {some(soon)}", mend)
    if dark:
        return Verdict(UNKNOWN, some(dark))
    return Verdict(OK, f"nothing of {plural(len(seen), 'certificate or list', 'certificates and lists')} ends soon")


def _limit(ending: Ending) -> timedelta:
    return _LIST if ending.revocations else _CERTIFICATE


def _retention(facts: Facts) -> Verdict:
    settings = facts.store.settings.retention
    if not settings.rules:
        mend = "[[retention.rules]] in strongroom.toml (docs/retention.md), then 'strongroom retention plan'"
        return Verdict(ADVICE, "no rules: every study is kept for ever", mend)
    rules = plural(len(settings.rules), "rule")
    if not settings.most_studies or settings.most_percent >= 100:
        found = f"{rules}, and no brake: one wrong rule can erase everything in one run"
        return Verdict(WARNING, found, "retention.most_studies = 500 and retention.most_percent = 2")
    if not settings.second_approver:
        return Verdict(ADVICE, f"{rules}; one person alone may erase a study", "retention.second_approver = true")
    return Verdict(OK, f"{rules}, with brakes and a second approver")


def _patches(facts: Facts) -> Verdict:
    found = see(facts.store.patches)
    mend = "'strongroom patch fetch', from a timer; then 'strongroom patch report'"
    if found.fetched is None:
        return Verdict(WARNING, "nobody ever looked which fixes there are", mend)
    old = facts.now - found.fetched
    if old > duration(facts.store.settings.patch_age.feed_limit):
        return Verdict(WARNING, f"what is known of fixes came {days(old)} ago", mend)
    return Verdict(OK, f"what is known of fixes came {days(old)} ago; 'strongroom patch report' judges it")


def _audit(facts: Facts) -> Verdict:
    server = facts.store.settings.audit.forward
    if server:
        return Verdict(OK, f"audit messages go to {server}")
    mend = "audit.forward in strongroom.toml; and note the head that 'strongroom audit verify' prints somewhere else"
    running = sorted(see(facts.machine.programs) & _FORWARDERS)
    if running:
        found = f"{some(running)} runs; whether it sends the log off this machine cannot be seen"
        return Verdict(WARNING, f"audit records are not forwarded; {found}", mend)
    return Verdict(WARNING, "neither audit records nor the log leave this machine", mend)


def _alerts(facts: Facts) -> Verdict:
    if facts.store.settings.alerts.sends:
        return Verdict(OK, "alerts are sent")
    mend = "alerts.mail or alerts.webhooks in strongroom.toml, then 'strongroom alerts test'"
    return Verdict(WARNING, "alerts are sent to nobody", mend)


PRACTICES = (
    Practice(
        "modes",
        _modes,
        "a file that others may read gives keys away; a folder that others may write lets them plant what is trusted",
    ),
    Practice(
        "users",
        _users,
        "only the system's walls between two users keep a gate that is taken over out of what is archived",
        "docs/design.md",
    ),
    Practice(
        "plaintext",
        _plaintext,
        "without TLS whoever reads the network reads patients, and whoever knows an AE title stores",
        "PS3.15 Annex B",
    ),
    Practice(
        "tls-profile",
        _tls,
        "an old version or a weak key lets others read or pretend",
        "PS3.15 B.12; RFC 9325; RFC 8996",
    ),
    Practice(
        "peers",
        _peers,
        "an AE title is no secret: only a certificate that is bound to it tells one device from another",
        "PS3.15 Annex B",
    ),
    Practice(
        "expiring",
        _expiring,
        "on the day that one ends, a modality stops sending, and somebody switches TLS off to go on",
    ),
    Practice(
        "retention",
        _retention,
        "what is kept longer than the law says is a liability in every leak; what goes too early is lost",
        "BSI IT-Grundschutz CON.6",
    ),
    Practice(
        "patches",
        _patches,
        "most break-ins use holes that had a fix",
        "CISA Known Exploited Vulnerabilities; BSI IT-Grundschutz OPS.1.1.3",
        of_content=True,
    ),
    Practice(
        "audit-forwarding",
        _audit,
        "who has the machine has its logs: what happened is proved by what left it before",
        "PS3.15 A.5; IHE ATNA; BSI IT-Grundschutz OPS.1.1.5",
        of_content=True,
    ),
    Practice(
        "alerts",
        _alerts,
        "what goes wrong at night is mended in time only if somebody hears of it",
        of_content=True,
    ),
)
