"""What only a GPU can show, in stages. scripts/gpu_check.sh starts this; docs/gpu.md tells what each outcome means.

    scripts/gpu_check.sh                  every stage that has not passed yet
    scripts/gpu_check.sh ipc protocol     of these stages the ones that have not passed yet
    scripts/gpu_check.sh --again train    this stage, also where it has passed

Each stage is one command in a process group of its own, with a time limit of nine minutes. Its log and its result stay in
--out (default: runs/gpu_check), so a run that was interrupted goes on where it stopped. A result counts only for the same
code, cards, driver and versions. At the end comes `record.md`: a block of Markdown for docs/gpu.md.

Exit code: 0 where every stage that was asked for has passed, 1 where one has not, 2 where nothing can be checked here.
What is missing is named before the first stage.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 540
GRACE_S = 20  # between the SIGINT and the SIGKILL of a stage that takes too long
PYTEST = (
    *("{python}", "-m", "pytest", "tests/gpu", "-q", "-rA", "--timeout", "200"),
    *("-W", "default", "-p", "no:benchmark", "-p", "no:cacheprovider"),  # other packages' plugins warn
    *("-n", "{workers}", "--dist", "worksteal", "--junitxml", "{out}/{name}.xml", "-k"),
)
DEATHS = "killed or dead or stamp or stuck or died or dies or sticky or watchdog"
PROTOCOL = (
    "bit_equal or used_again or far_behind or no_host_wait or synchronisation or allocator or "
    "expandable or auto_takes or (test_launched and host_plane)"
)


class Stage(NamedTuple):
    """`command`: {python}, {out}, {workers} and {name} are filled in. It may leave {out}/NAME.xml (JUnit), NAME.json with
    `found` (lines) and `targets` (as of benchmarks.tables.Target), and NAME.md for the record."""

    name: str
    shows: str
    command: tuple[str, ...]
    limit_s: float = LIMIT_S


STAGES = (
    Stage("facts", "what the machine has", ("{python}", "-m", "shmbridge.launch", "doctor")),
    Stage("ipc", "CUDA IPC without the bridge", ("{python}", "scripts/gpu/ipc.py", "--json", "{out}/ipc.json")),
    Stage(
        "protocol",
        "replies are right, slots are used again, no host waits",
        (*PYTEST, f"({PROTOCOL}) and not ({DEATHS})"),
    ),
    Stage("deaths", "teachers and ranks that are killed", (*PYTEST, DEATHS)),
    Stage("rest", "every other test of tests/gpu", (*PYTEST, f"not ({PROTOCOL}) and not ({DEATHS})")),
    Stage("bench", "bandwidth and CPU time", ("{python}", "scripts/bench.py", "cuda", "--json", "{out}/bench.json")),
    Stage(
        "train", "a distillation, with and without the bridge", ("{python}", "scripts/gpu/train.py", "--out", "{out}")
    ),
)

# What the stages import, and where its package has another name.
NEEDS = [
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "msgspec",
    "posix_ipc",
    "yaml",
    "pytest",
    "pytest_timeout",
    "xdist",
    "rich",
]
PACKAGES = {"yaml": "PyYAML", "pytest_timeout": "pytest-timeout", "xdist": "pytest-xdist"}


@dataclass
class Where:
    """What a result depends on."""

    cards: list[str]
    driver: str
    versions: dict[str, str]
    code: str  # a hash of the sources


class Unusable(Exception):
    """Nothing can be checked here."""


def main(
    arguments: Sequence[str] | None = None,
    stages: Sequence[Stage] = STAGES,
    look: Callable[[], Where] | None = None,
) -> int:
    """Run the stages that are asked for and have not passed, then show all that is known."""
    options = _parse(arguments, stages)
    try:
        where = (look or look_around)()
    except Unusable as reason:
        print(f"gpu_check: {reason}; nothing was checked", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in stages if stage.name in options.stages or not options.stages]
    try:
        for stage in chosen:
            record = kept(stage, options.out, where)
            if record.get("result") == "passed" and not options.again:
                print(f"{stage.name}: has passed on {record['date']} (--again runs it again)", flush=True)
            else:
                run(stage, options, where)
    except KeyboardInterrupt:
        print("gpu_check: stopped; the same command goes on with the stages that have not passed", file=sys.stderr)
        return 130
    records = {stage.name: kept(stage, options.out, where) for stage in stages}
    shown = markdown(records, where, options.out)
    (options.out / "record.md").write_text(shown)
    print(f"\n{shown}\nfor docs/gpu.md: {options.out / 'record.md'}")
    return int(any(records[stage.name].get("result") != "passed" for stage in chosen))


def _parse(arguments: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    names = [stage.name for stage in stages]
    told = "\n".join(f"  {stage.name:9} {stage.shows}" for stage in stages)
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh",
        description=f"{__doc__}\nstages:\n{told}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--again", action="store_true", help="run them also where they have passed")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="logs and results")
    parser.add_argument("--workers", type=int, default=4, help="of pytest, which share the card (default: 4)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.stages if name not in names]:
        parser.error(f"there is no stage {unknown[0]!r}; expected {', '.join(names)}")
    options.out = options.out.absolute()
    return options


# The machine


def look_around() -> Where:
    """Cards, driver, versions and code.

    Raises:
        Unusable: a package is missing, or torch finds no CUDA device.
    """
    if missing := [PACKAGES.get(name, name) for name in NEEDS if not find_spec(name)]:
        raise Unusable(
            f"{sys.executable} lacks {', '.join(missing)}: install them, or give wheels with --wheels DIRECTORY"
        )
    from shmbridge.plane import devices

    asked = subprocess.run([sys.executable, "-m", devices.__name__], cwd=ROOT, capture_output=True, check=False)
    found = devices.parse(asked.stdout)
    if found is None:
        last = (asked.stderr.decode(errors="replace").strip() or "no message").splitlines()[-1]
        raise Unusable(f"{sys.executable} failed: {last}")
    if not found.devices:
        raise Unusable(f"no CUDA here: torch.cuda.is_available() is False ({found.problem}, torch {found.torch})")
    versions = {"Python": platform.python_version(), "torch": found.torch, "CUDA": found.cuda}
    versions |= {name: version(name) for name in ("transformers", "accelerate", "msgspec", "posix_ipc")}
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    digest = hashlib.sha256()
    for folder in ("shmbridge", "launcher", "tests/gpu", "scripts"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return Where([card.name for card in found.devices], driver, versions, digest.hexdigest()[:12])


def _first_line(*command: str) -> str:
    """What it prints; empty where it is not installed, fails, or takes a minute."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    except (FileNotFoundError, subprocess.SubprocessError):
        return ""
    return "".join(done.stdout.splitlines()[:1])


# A stage


def run(stage: Stage, options: argparse.Namespace, where: Where) -> None:
    """Run it to its end or its limit, and keep its record in {out}/NAME.result.json."""
    out: Path = options.out
    for suffix in (".result.json", ".xml", ".json", ".md"):
        (out / (stage.name + suffix)).unlink(missing_ok=True)
    filled = {"python": sys.executable, "out": str(out), "workers": str(options.workers), "name": stage.name}
    command = [part.format(**filled) for part in stage.command]
    log = out / f"{stage.name}.log"
    print(f"{stage.name}: {stage.shows}; log: {log}", flush=True)
    date, began, before = datetime.now(UTC), time.monotonic(), _shared_memory()
    with log.open("w") as file:
        code = _run_group(command, file, stage.limit_s)
    result, found = judge(out, stage, code)
    _, *lines = log.read_text(errors="replace").splitlines()
    if not found and lines:
        found.append(lines[-1].strip())
    if left := sorted(_shared_memory() - before):
        found.append(f"new in /dev/shm: {', '.join(left[:5])}{' ...' if len(left) > 5 else ''}")
    record = {
        "stage": stage.name,
        "result": result,
        "seconds": round(time.monotonic() - began),
        "date": date.isoformat(timespec="seconds"),
        "command": shlex.join(command).replace(sys.executable, "python").replace(str(out), "OUT"),
        "where": asdict(where),
        "found": found,
    }
    (out / f"{stage.name}.result.json").write_text(json.dumps(record, indent=1))
    print(f"{stage.name}: {result} after {record['seconds']} s", flush=True)
    if result != "passed":
        print("".join(f"    {line}\n" for line in lines[-15:]), end="", flush=True)


def _run_group(command: Sequence[str], log: IO[str], limit_s: float) -> int | None:
    """The exit code; None where it took longer than `limit_s`. Nothing of its process group is left."""
    print(f"$ {shlex.join(command)}", file=log, flush=True)
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # pytest writes its report at a SIGINT, and a launcher ends its processes
        for number, grace_s in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(grace_s)


def _shared_memory() -> set[str]:
    """The names in /dev/shm that are this user's."""
    found = set()
    for name in os.listdir("/dev/shm"):
        with suppress(FileNotFoundError):  # gone meanwhile: a launcher that was ended still clears up
            if os.lstat(f"/dev/shm/{name}").st_uid == os.getuid():
                found.add(name)
    return found


def judge(out: Path, stage: Stage, code: int | None) -> tuple[str, list[str]]:
    """What became of a stage, in a word, and what was found."""
    found: list[str] = []
    good, targets_reached = True, True
    if (report := out / f"{stage.name}.xml").exists():
        good, found = tests(report)
    elif "--junitxml" in stage.command:
        good = False
        found.append("pytest wrote no report")
    if (figures := out / f"{stage.name}.json").exists():
        told = json.loads(figures.read_text())
        found += told.get("found", [])
        for target in told.get("targets", []):
            targets_reached &= bool(target["reached"])
            word = {True: "reached", False: "missed", None: "not measured"}[target["reached"]]
            found.append(f"{target['text']}: {target['found']} ({word}, limit {target['limit']})")
    if code is None:
        return "timed out", [f"longer than {stage.limit_s:g} s", *found]
    if good and not targets_reached and code == 1:
        return "target missed", found
    if code or not good:
        return "failed", [f"exit code {code}", *found] if code else found
    return "passed", found


def tests(report: Path) -> tuple[bool, list[str]]:
    """Of a JUnit file: whether some test passed and every other one could not run for want of a second GPU; and counts."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = next((each for each in case if each.tag in ("skipped", "failure", "error")), None)
        if outcome is None:
            passed += 1
        elif outcome.tag == "skipped":
            skipped[outcome.get("message", "")] += 1
        else:
            failed.append(case.get("name", ""))
    found = [f"{passed} passed"]
    found += [f"{len(failed)} failed: {', '.join(failed)}"] if failed else []
    found += [f"{count} skipped: {reason}" for reason, count in skipped.items()]
    return bool(passed) and not failed and all("GPUs, there" in reason for reason in skipped), found


def kept(stage: Stage, out: Path, where: Where) -> dict[str, Any]:
    """The record of an earlier run of the same code on the same machine; empty where there is none."""
    file = out / f"{stage.name}.result.json"
    record: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return record if record.get("where") == asdict(where) else {}


# What is shown


def markdown(records: dict[str, dict[str, Any]], where: Where, out: Path) -> str:
    """The block for docs/gpu.md: date, cards, driver, versions, and of each stage the command, the result and what was found."""
    dates = sorted(record["date"][:10] for record in records.values() if record)
    date = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "-"
    cards = ", ".join(f"{where.cards.count(card)} x {card}" for card in dict.fromkeys(where.cards))
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    commit = _first_line("git", "describe", "--always", "--dirty")
    lines = [f"### {date}: {cards}", "", "| | |", "|---|---|"]
    facts = {"date": date, "cards": cards, "driver": where.driver, "versions": versions}
    facts["code"] = ", ".join(filter(None, (commit, f"sources {where.code}")))
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    lines += ["", "| stage | result | seconds | found | command |", "|---|---|---|---|---|"]
    for name, record in records.items():
        cells = (name, "not run", "", "", "")
        if record:
            found = "<br>".join(record["found"])
            cells = (name, record["result"], str(record["seconds"]), found, f"`{record['command']}`")
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    more = [(out / f"{name}.md").read_text().strip() for name in records if (out / f"{name}.md").exists()]
    return "\n\n".join(["\n".join(lines), *more]) + "\n"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
