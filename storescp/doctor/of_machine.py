"""Practices of the machine: its disks, memory, clock, network face, and what else runs on it. Pure."""

from __future__ import annotations

import ipaddress

from storescp.config import parse_address
from storescp.doctor.facts import Facts, Place, Unseen, UnseenError, see
from storescp.doctor.findings import ADVICE, CRITICAL, OK, UNKNOWN, WARNING
from storescp.doctor.practice import Practice, Verdict, some

_SSH = 22
_STRICT, _LOOSE = 2.0, 5.0
_UNITS = ("strongroom-gate.service", "strongroom-vault.service")
_DESKTOPS = {
    *("xorg", "x", "xwayland", "gnome-shell", "gnome-session-b", "plasmashell", "kwin_x11", "kwin_wayland"),
    *("xfce4-session", "mate-session", "cinnamon", "lxsession", "lxqt-session", "sway", "weston"),
    *("gdm", "gdm3", "sddm", "lightdm", "lxdm", "xdm", "firefox", "firefox-esr", "chrome", "chromium", "thunderbird"),
    *("xrdp", "xrdp-sesman", "xvnc", "xtigervnc", "x11vnc", "vncserver-x11", "teamviewerd", "anydesk", "rustdesk"),
}
_SERVICES = {
    *("mysqld", "mariadbd", "postgres", "mongod", "redis-server", "memcached", "oracle", "sqlservr", "slapd"),
    *("nginx", "apache2", "httpd", "lighttpd", "caddy", "haproxy", "squid", "traefik", "tomcat", "php-fpm"),
    *("smbd", "nmbd", "winbindd", "nfsd", "rpc.mountd", "rpcbind", "vsftpd", "proftpd", "tftpd", "in.tftpd"),
    *("named", "dnsmasq", "dhcpd", "cupsd", "master", "exim4", "sendmail", "dovecot", "telnetd", "in.telnetd"),
    *("dockerd", "containerd", "kubelet", "k3s", "podman", "libvirtd", "qemu-system-x86", "jenkins"),
    *("orthanc", "storescp", "dcmqrscp", "wlmscpfs"),
}
# Those that scan each file as it is opened; the others scan when they are asked.
_ON_ACCESS = {
    *("clamonacc", "wdavdaemon", "falcon-sensor", "falcond", "ds_agent", "savd", "sophos_threat_d", "soapd"),
    *("cbagentd", "sentineld", "s1-agent", "esets", "oaeventd", "fsoasd", "kesl", "bdsecd", "xagt", "cylancesvc"),
    *("isectpd", "mfetpd", "drweb-spider"),
}
_ON_DEMAND = {"clamd", "freshclam", "rkhunter", "savscand", "avgd"}


def _disk_encryption(facts: Facts) -> Verdict:
    places = [place for place in see(facts.store.places) if place.name != "backups"]
    lost = [_where(p) for p in places if p.encrypted is None and p.name != "key file"]
    if lost:
        mend = "move it to a disk, and name it in strongroom.toml, [store]"
        return Verdict(CRITICAL, f"in memory, gone at the next start: {some(lost)}", mend)
    mend = "'cryptsetup luksFormat --type luks2 DEVICE', a file system on it, and move the store there"
    if clear := [_where(place) for place in places if place.encrypted is False]:
        return Verdict(WARNING, f"not under dm-crypt: {some(clear)}", mend)
    if dark := [(p, p.encrypted) for p in places if isinstance(p.encrypted, Unseen)]:
        return Verdict(UNKNOWN, some([f"{p.name}: {reason.reason}" for p, reason in dark]), "lsblk --inverse")
    return Verdict(OK, "store, spool and anchors are under dm-crypt")


def _where(place: Place) -> str:
    disks = f" on {', '.join(place.disks)}" if place.disks else ""
    return f"{place.name} ({place.path}, {place.filesystem}{disks})"


def _key_file(facts: Facts) -> Verdict:
    named = facts.store.settings.unlock.key_file
    if not named:
        return Verdict(OK, "no key file: somebody unlocks the vault, or a token does")
    if named.startswith("credential:"):
        found = "a systemd credential; whether it is encrypted (LoadCredentialEncrypted=) cannot be seen"
        return Verdict(UNKNOWN, found, "systemctl cat strongroom-vault | grep LoadCredential")
    place, store = _place(facts, "key file"), _place(facts, "store")
    mend = "'strongroom keys slot add --key-file FILE' with FILE on another medium, and name it in unlock.key_file"
    if place.encrypted is None:
        return Verdict(OK, f"{place.path} is in memory")
    if not _together(place, store):
        return Verdict(OK, f"{place.path} is not on the store's disk")
    if store.encrypted is True and place.encrypted is True:
        return Verdict(WARNING, f"{place.path} is on the store's disk, which is under dm-crypt", mend)
    if isinstance(place.encrypted, Unseen) or isinstance(store.encrypted, Unseen):
        found = f"{place.path} is on the store's disk; whether that is encrypted cannot be seen"
        return Verdict(WARNING, found, mend)
    return Verdict(CRITICAL, f"{place.path} is on the store's disk: whoever takes it can read every study", mend)


def _anchors(facts: Facts) -> Verdict:
    if facts.store.settings.keys.anchor == "token":
        return Verdict(OK, "anchors are on a token")
    place, store = _place(facts, "anchors"), _place(facts, "store")
    mend = 'move the folder to a medium of its own and set store.anchors; or keys.anchor = "token" (docs/anchors.md)'
    if place.mount == store.mount:
        return Verdict(WARNING, f"{place.path} is on the store's file system, and in each snapshot of it", mend)
    if _together(place, store):
        return Verdict(ADVICE, f"{place.path} is a file system of its own, on the store's disk", mend)
    return Verdict(OK, f"{place.path} is not on the store's disk")


def _place(facts: Facts, name: str) -> Place:
    found = next((place for place in see(facts.store.places) if place.name == name), None)
    if found is None:
        raise UnseenError(f"nobody looked where the {name} is")
    return found


def _together(one: Place, other: Place) -> bool:
    if one.mount == other.mount:
        return True
    if not one.disks or not other.disks:
        raise UnseenError(f"on which disks {one.path} and {other.path} are cannot be seen")
    return not set(one.disks).isdisjoint(other.disks)


def _swap(facts: Facts) -> Verdict:
    areas = see(facts.machine.swaps)
    if not areas:
        return Verdict(OK, "no swap")
    mend = "'swapoff -a', and take swap out of /etc/fstab; or encrypt it with a random key in /etc/crypttab"
    if clear := [area.name for area in areas if area.encrypted is False]:
        own = facts.machine.processes
        if not isinstance(own, Unseen) and own and all(process.locked for process in own):
            found = f"not encrypted: {some(clear)}; the memory of every process of ours is locked"
            return Verdict(ADVICE, found, mend)
        return Verdict(WARNING, f"not encrypted: {some(clear)}", mend)
    if dark := [(area.name, area.encrypted) for area in areas if isinstance(area.encrypted, Unseen)]:
        return Verdict(UNKNOWN, some([f"{name}: {reason.reason}" for name, reason in dark]), mend)
    return Verdict(OK, f"encrypted or in memory: {some([area.name for area in areas])}")


def _core_dumps(facts: Facts) -> Verdict:
    cores = see(facts.machine.cores)
    if cores.kdump:
        mend = "'systemctl disable --now kdump-tools' (or kdump), and take crashkernel= off the kernel's command line"
        return Verdict(WARNING, "kdump is loaded: a crash of the kernel writes the unlocked vault's memory", mend)
    own = facts.machine.processes
    if not isinstance(own, Unseen) and (dumping := [f"{p.verb} ({p.pid})" for p in own if p.core]):
        return Verdict(
            WARNING,
            f"processes of ours may dump core: {some(dumping)}",
            "systemctl restart strongroom-gate strongroom-vault",
        )
    if cores.pattern in {"", "|/bin/false", "|/bin/true"}:
        return Verdict(OK, "nothing keeps core dumps")
    found = f"ours never dump core; other programs do, such as one that reads an export: {cores.pattern}"
    return Verdict(ADVICE, found, "sysctl -w kernel.core_pattern='|/bin/false'")


def _addresses(facts: Facts) -> Verdict:
    gate, numbers = facts.store.settings.gate, facts.store.settings.metrics.listen
    if numbers and not ipaddress.ip_address(parse_address(numbers)[0]).is_loopback:
        mend = 'metrics.listen = "127.0.0.1:9464", and let who asks come through a proxy with TLS'
        return Verdict(WARNING, f"numbers, AE titles among them, without TLS or log-in on {numbers}", mend)
    desk = facts.store.settings.desk
    texts = [*gate.listen, *(listener.listen for listener in gate.plaintext), *desk.listen, *desk.web]
    found = [(text, ipaddress.ip_address(parse_address(text)[0])) for text in texts]
    mend = "name the address in the modalities' network in gate.listen, desk.listen or desk.web, then restart"
    if public := [text for text, address in found if address.is_global]:
        return Verdict(WARNING, f"on an address of the internet: {some(public)}", mend)
    if every := [text for text, address in found if address.is_unspecified]:
        return Verdict(WARNING, f"on every address of this machine: {some(every)}", mend)
    return Verdict(OK, f"on {some(texts)}")


def _services(facts: Facts) -> Verdict:
    known = facts.machine.programs
    running = sorted(known & _SERVICES) if not isinstance(known, Unseen) else []
    heard = facts.machine.listeners
    outside = [
        f"{one.address}:{one.port}{f' ({one.program})' if one.program else ''}"
        for one in (() if isinstance(heard, Unseen) else heard)
        if not one.ours and one.port != _SSH and not ipaddress.ip_address(one.address).is_loopback
    ]
    said = [f"other services run: {some(running)}"] if running else []
    said += [f"other listeners than ours and SSH: {some(outside)}"] if outside else []
    if said:
        mend = "'systemctl disable --now SERVICE', or move it to another machine; 'ss -tlnp' lists who listens"
        return Verdict(WARNING, "; ".join(said), mend)
    see(known), see(heard)
    return Verdict(OK, "no other service that is known to the doctor, and nobody else listens to the network")


def _desktop(facts: Facts) -> Verdict:
    if found := sorted(see(facts.machine.programs) & _DESKTOPS):
        mend = "'systemctl set-default multi-user.target', and remove the desktop and remote desktops"
        return Verdict(WARNING, f"a desktop, or a way to one, runs: {some(found)}", mend)
    return Verdict(OK, "no desktop")


def _antivirus(facts: Facts) -> Verdict:
    known = see(facts.machine.programs)
    if found := sorted(known & _ON_ACCESS):
        mend = "exclude store.path, store.spool and store.anchors from it, in its own settings"
        said = f"scans files as they are opened: {some(found)}; what it leaves out cannot be seen"
        return Verdict(UNKNOWN, said, mend)
    if found := sorted(known & _ON_DEMAND):
        return Verdict(OK, f"scans when it is asked: {some(found)}")
    mend = "'apt-get install clamav', and scan what is exported; or note why this machine has none"
    return Verdict(ADVICE, "none that is known to the doctor", mend)


def _firewall(facts: Facts) -> Verdict:
    found = see(facts.machine.firewall)
    if found.filters:
        return Verdict(OK, f"incoming packets are filtered ({found.source})")
    mend = (
        "'systemctl enable --now nftables', with a chain for input of policy drop that lets in the gate's port and SSH"
    )
    return Verdict(WARNING, f"nothing that comes in is dropped ({found.source})", mend)


def _clock(facts: Facts) -> Verdict:
    if see(facts.machine.synchronised):
        return Verdict(OK, "the kernel says that it is synchronised")
    return Verdict(WARNING, "nobody keeps the clock synchronised", "apt-get install chrony")


def _sandbox(facts: Facts) -> Verdict:
    units = see(facts.machine.units)
    mend = "'strongroom install --dry-run' shows what 'strongroom install' does"
    if missing := [name for name in _UNITS if name not in {unit.name for unit in units}]:
        return Verdict(WARNING, f"not installed, so that gate or vault run without a sandbox: {some(missing)}", mend)
    said = some([f"{u.name} {_level(u.exposure)}" for u in units])
    levels = [unit.exposure for unit in units if not isinstance(unit.exposure, Unseen)]
    worst = max(levels, default=0.0)
    if worst > _STRICT:
        mend = "'systemctl revert strongroom-gate strongroom-vault', or weigh each line of their drop-ins"
        return Verdict(CRITICAL if worst > _LOOSE else WARNING, f"exposure of 10: {said}", mend)
    if len(levels) < len(units):
        return Verdict(UNKNOWN, said, "systemd-analyze security --offline=true FILE")
    return Verdict(OK, f"exposure of 10: {said}")


def _level(exposure: float | Unseen) -> str:
    return exposure.reason if isinstance(exposure, Unseen) else f"{exposure:.1f}"


PRACTICES = (
    Practice(
        "disk-encryption",
        _disk_encryption,
        "studies are sealed all the same, but a disk without it shows how many there are and how large, and whatever "
        "lies beside them: the TLS key, the configuration, the system's logs",
        "NIST SP 800-111",
    ),
    Practice(
        "key-file",
        _key_file,
        "encryption protects a disk that is taken away only if what opens it does not go along",
        "NIST SP 800-57",
    ),
    Practice(
        "anchors",
        _anchors,
        "destroying an anchor proves a key version gone; a snapshot or an image of the disk keeps a copy of it",
        "NIST SP 800-88",
    ),
    Practice("swap", _swap, "what a process has in memory, keys and plaintext too, can be written to swap and stay"),
    Practice("core-dumps", _core_dumps, "a core dump is a process's memory on a disk, in the clear"),
    Practice(
        "addresses",
        _addresses,
        "whom a listener does not reach cannot attack it: DICOM belongs into a network of modalities and archives",
        "CISA and BSI: segment networks",
    ),
    Practice(
        "services",
        _services,
        "each service more is a way more into the machine that holds the keys; a store needs one purpose",
        "BSI IT-Grundschutz SYS.1.1",
    ),
    Practice(
        "desktop",
        _desktop,
        "a browser, mail and remote desktops are how ransomware usually comes in, and people stay logged in",
        "BSI IT-Grundschutz SYS.1.1",
    ),
    Practice(
        "antivirus",
        _antivirus,
        "many hospitals must have one; it finds nothing in sealed packs, and one that locks or moves them stops the "
        "store",
        "BSI IT-Grundschutz OPS.1.1.4",
    ),
    Practice(
        "firewall",
        _firewall,
        "a rule that drops everything else holds when somebody installs a service without a thought of it",
        "BSI IT-Grundschutz SYS.1.1",
    ),
    Practice(
        "clock",
        _clock,
        "certificates, retention and the audit chain hang on the time, and an inspector compares it with other logs",
        "IHE Consistent Time; BSI IT-Grundschutz OPS.1.1.5",
    ),
    Practice(
        "sandbox",
        _sandbox,
        "what takes over the gate meets the kernel's and systemd's walls next: the less it may, the less it gets",
    ),
)
