"""The pre-encoded client: one process an association, started on a barrier, the latency of every C-STORE recorded.

What it sends is ready in memory before the clock starts; a new object costs three patched UIDs. What it can do at most
is measured against a sink that only decrypts (``--servers sink``).
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from array import array
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import NamedTuple

from benchmarks.objects import CT_IMAGE, Template, Uids
from benchmarks.programs import found
from benchmarks.upper import Association, Message, ProtocolError, Target, tls_context

# Where Debian 12 keeps the data dictionary; DCMTK's tools look for it elsewhere.
DCMDICT = "/usr/share/libdcmtk17/dicom.dic"
_SPAWN = multiprocessing.get_context("spawn")


class Job(NamedTuple):
    """What every association does.

    ``template`` None: so many associations one after the other, each with one C-ECHO; else so many C-STOREs.
    ``idle``: associations that the first process holds open meanwhile.
    """

    target: Target
    template: Template | None
    times: int
    idle: int = 0
    timeout: float = 120.0


class Part(NamedTuple):
    """What one process did. Times are of the monotonic clock, in seconds."""

    started: float
    ended: float
    cpu: float
    latencies: array[float]
    bytes: int
    tls: str
    error: str


class Burst(NamedTuple):
    """What all processes did together. ``ended``: when the last response came, by the monotonic clock."""

    seconds: float
    ended: float
    objects: int
    bytes: int
    client_cpu: float
    latencies: list[float]
    tls: str
    failures: list[str]


def burst(job: Job, associations: int) -> Burst:
    """Run a job on so many associations at once; the clock runs from the barrier to the last response.

    Raises:
        TimeoutError: A process did not answer in time.
    """
    barrier = _SPAWN.Barrier(associations)
    pipes, processes = [], []
    try:
        for number in range(associations):
            ours, theirs = _SPAWN.Pipe(duplex=False)
            one = job if number == 0 else job._replace(idle=0)
            process = _SPAWN.Process(target=_run, args=(one, barrier, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        parts = [_received(pipe, job.timeout) for pipe in pipes]
    except BaseException:
        for process in processes:
            process.kill()
        raise
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()
    good = [part for part in parts if part.latencies]
    ended = max((p.ended for p in good), default=0.0)
    return Burst(
        ended - min((p.started for p in good), default=0.0),
        ended,
        sum(len(p.latencies) for p in good),
        sum(p.bytes for p in good),
        sum(p.cpu for p in good),
        [latency for p in good for latency in p.latencies],
        next((p.tls for p in good), ""),
        [p.error for p in parts if p.error],
    )


def storescu(target: Target, folders: list[str], timeout: float) -> Burst:
    """Send folders of files with DCMTK's storescu, a process each; its start-up and its reading are timed too.

    Raises:
        subprocess.TimeoutExpired: It took too long.
    """
    credentials = target.credentials
    command = [
        found("storescu") or "storescu",
        "-R",
        "-pdu",
        "131072",
        "+tls",
        credentials.key,
        credentials.certificate,
    ]
    command += ["+cf", credentials.authority, "-aet", credentials.title, "-aec", target.called]
    environment = {"DCMDICTPATH": DCMDICT} | os.environ | {"TCP_NODELAY": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.monotonic()
    try:
        for folder in folders:
            full = [*command, "+sd", "127.0.0.1", str(target.port), folder]
            processes.append(
                subprocess.Popen(
                    full, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
                )
            )
        said = [p.communicate(timeout=timeout)[1].decode(errors="replace") for p in processes]
        ended = time.monotonic()
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    failures = [said[i][-200:].strip() or f"status {p.returncode}" for i, p in enumerate(processes) if p.returncode]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Burst(ended - started, ended, 0, 0, cpu, [], "", failures)


def _received(pipe: Connection, timeout: float) -> Part:
    if not pipe.poll(timeout + 60):
        raise TimeoutError("a client did not answer in time")
    part: Part = pipe.recv()
    return part


def _run(job: Job, barrier: Barrier, results: Connection) -> None:
    # Ctrl-C reaches all of the terminal's processes; one of them says what happened.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    latencies = array("d")
    try:
        with contextlib.ExitStack() as stack:
            context = tls_context(job.target.credentials)
            for _ in range(job.idle):
                stack.callback(Association(job.target, context, _class(job), job.timeout).release)
            part = _setups(job, barrier, latencies) if job.template is None else _stores(job, barrier, latencies)
    except Exception as error:
        barrier.abort()
        part = Part(0.0, 0.0, 0.0, array("d"), 0, "", f"{type(error).__name__}: {error}")
    results.send(part)


def _class(job: Job) -> str:
    return job.template.sop_class if job.template else CT_IMAGE


def _stores(job: Job, barrier: Barrier, latencies: array[float]) -> Part:
    template = job.template
    if template is None:
        raise ProtocolError("nothing to store")
    uids = Uids()
    association = Association(job.target, tls_context(job.target.credentials), template.sop_class, job.timeout)
    message = Message(template, association.maximum_pdu, uids.new(), uids.new())
    send, response, clock = association.send, association.response, time.perf_counter
    gc.freeze()
    gc.disable()
    barrier.wait(job.timeout)
    deadline = time.monotonic() + job.timeout
    cpu, started = time.process_time(), time.monotonic()
    for number in range(job.times):
        message.renew(uids.new(), number)
        begun = clock()
        for piece, repeat in message.pieces:
            for _ in range(repeat):
                send(piece)
        response()
        latencies.append(clock() - begun)
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {number + 1} objects in time")
    ended, cpu = time.monotonic(), time.process_time() - cpu
    association.release()
    return Part(started, ended, cpu, latencies, len(latencies) * template.size, association.tls, "")


def _setups(job: Job, barrier: Barrier, latencies: array[float]) -> Part:
    context = tls_context(job.target.credentials)
    tls = ""
    barrier.wait(job.timeout)
    cpu, started = time.process_time(), time.monotonic()
    for _ in range(job.times):
        begun = time.perf_counter()
        association = Association(job.target, context, _class(job), job.timeout)
        association.echo()
        latencies.append(time.perf_counter() - begun)
        tls = association.tls
        association.release()
    ended, cpu = time.monotonic(), time.process_time() - cpu
    return Part(started, ended, cpu, latencies, 0, tls, "")
