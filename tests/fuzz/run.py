"""Run fuzz targets: ``python tests/fuzz/run.py all --seconds 300``. What an input reaches in our code guides the next.

Each target runs in a process of its own, one after the other; what it found worth keeping stays in its folder, so that
the next run goes on from there. What libFuzzer says goes to ``<folder>/<target>/log``, a line a target to the output.
Exit status: 0 every promise was kept, 1 one was broken or a target did not run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Ours, and what reads bytes on our behalf: without tracing those, mutations of their input would go blind.
TRACED = ["keys", "storage", "storescp", "pynetdicom", "h11", "python_multipart", "tomllib"]
_MEMORY_MIB = 1024
# Longer than the longest good input; what is longer still only makes runs slow. Packs are made of pages.
_LONGEST = 4096
_LONGEST_OF = {"pack": 28_672}
_FOUND = ("crash-", "timeout-", "oom-", "leak-")


def main() -> int:
    """Run what the command line names."""
    options = _options()
    # Nobody reads it, and formatting it would take most of the time.
    logging.disable(logging.CRITICAL)
    if options.replay is not None:
        return _replay(options.target, options.replay)
    import atheris

    said = io.StringIO()
    with contextlib.redirect_stderr(said), atheris.instrument_imports(include=TRACED):
        import seeds
        import targets
    names = list(targets.TARGETS) if options.target == "all" else [options.target]
    failed = 0
    for name in names:
        if name not in targets.TARGETS | targets.PLANTED:
            print(f"no target {name}; there are: {', '.join(targets.TARGETS)}, or 'all'", file=sys.stderr)
            return 2
        folder = (options.corpus / name).resolve()
        for sub in ("corpus", "seeds"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(seeds.seeds(name)):
            (folder / "seeds" / f"{number:03}").write_bytes(seed)
        (folder / "words").write_text("".join(_entry(word) for word in seeds.words(name)))
        # Forked, because what is traced is decided at the import, and that takes longer than a short run.
        began = time.time()
        process = os.fork()
        if process == 0:
            _fuzz(folder, functools.partial(targets.give, name), options, name)
        status = _wait(process)
        failed += _told(name, folder, began, status)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="name of a target, or 'all'")
    parser.add_argument("--seconds", type=int, default=0, help="how long each target runs; 0: until --runs are done")
    parser.add_argument("--runs", type=int, default=-1, help="how many inputs each target gets at most")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0 takes one of its own")
    parser.add_argument("--timeout", type=int, default=20, help="seconds that one input may take")
    parser.add_argument("--corpus", type=Path, default=Path("var/fuzz"), help="where inputs, findings and logs are")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="give a target this one input, without atheris")
    options = parser.parse_args()
    if options.replay is None and not options.seconds and options.runs < 0:
        parser.error("name --seconds or --runs")
    return options


def _replay(name: str, file: Path) -> int:
    import targets

    targets.give(name, file.read_bytes())
    print(f"{name}: the promise is kept")
    return 0


def _fuzz(folder: Path, target: Callable[[bytes], None], options: argparse.Namespace, name: str) -> None:
    """Fuzz in this process, which ends here."""
    import atheris

    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        arguments = [
            f"-max_total_time={options.seconds}",
            f"-runs={options.runs}",
            f"-seed={options.seed}",
            f"-timeout={options.timeout}",
            f"-max_len={_LONGEST_OF.get(name, _LONGEST)}",
            f"-rss_limit_mb={_MEMORY_MIB}",
            f"-artifact_prefix={folder}/",
            "-print_final_stats=1",
            # What is parsed in C is not traced: every good input looks like one byte there, and must stay all the same.
            "-keep_seed=1",
            "-reduce_inputs=0",
        ]
        if (folder / "words").stat().st_size:
            arguments.append(f"-dict={folder / 'words'}")
        atheris.Setup([name, *arguments, str(folder / "corpus"), str(folder / "seeds")], target)
        # Does not come back: an error leaves as SystemExit, and libFuzzer keeps the input while the process ends.
        atheris.Fuzz()
    except Exception:
        traceback.print_exc()
    os._exit(99)


def _wait(process: int) -> int:
    while True:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        except KeyboardInterrupt:
            # The terminal told libFuzzer, too; it says what it has and ends.
            continue


def _told(name: str, folder: Path, began: float, status: int) -> bool:
    """Print what became of a target; tell whether it failed."""
    log = (folder / "log").read_text("utf-8", "replace")
    runs = re.findall(r"^stat::number_of_executed_units: (\d+)", log, re.MULTILINE)
    edges = re.findall(r"\bcov: (\d+)", log)
    found = [p for p in sorted(folder.glob("*-*")) if p.name.startswith(_FOUND) and p.stat().st_mtime >= began - 1]
    count = int(runs[-1]) if runs else 0
    # Runs that never happened, or that nothing was traced in, keep no promise.
    ran = count > 0 and bool(edges) and int(edges[-1]) > 1
    result = "ok" if status == 0 and ran else f"FAILED with {status}" if ran or status else "DID NOT RUN"
    seconds = time.time() - began
    print(f"{name:15} {count:>9,} runs {edges[-1] if edges else 0:>6} edges {seconds:>7.1f} s  {result}", flush=True)
    for file in found:
        script = os.path.relpath(__file__)
        print(f"  {file}\n  again: {shlex.join([sys.executable, script, name, '--replay', str(file)])}", flush=True)
    if result == "ok":
        return False
    print(f"  log: {folder / 'log'}", flush=True)
    return True


def _entry(word: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'


if __name__ == "__main__":
    sys.exit(main())
