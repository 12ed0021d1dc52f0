"""Rows 17 to 21: refused."""

from __future__ import annotations

import os
import re

from faultlines.rows import Stage
from faultlines.runs import ROOT, Run, python

_INPUTS = {
    "an ID out of the vocabulary": "128",
    "a negative ID": "-100",
    "wrong dtype": "float32",
    "wrong rank": r"\(4,\)|shape|axes|dimension",
    "too long": "ring.max_tokens",
    "empty": "0",
    "wrong device": "meta",
}


def bad_input(stage: Stage) -> None:
    run = stage.launch("bad_input")
    for rank in (0, 1):
        run.note(f"went-on-{rank}")
    for name, told in _INPUTS.items():
        seconds, text = run.note(f"refused-{name}")[1].split("\n", 1)
        stage.took(f"{name}: the refusal", float(seconds), 0.1)
        stage.expect(re.search(told, text), f"{name}: the message is {text!r}")
    stage.expect(stage.seen_by_teacher() <= set(range(128)), "the teacher has seen what it cannot take")
    stage.ends_with(run, 0)
    stage.says(
        f"{len(_INPUTS)} kinds, each a ValueError in its rank; none reached the teacher; training went on, exit 0"
    )


def plan_too_large(stage: Stage) -> None:
    run = stage.launch("loop", "ring.max_tokens=1000000000000")
    stage.took("the refusal, from the start of the command", run.end() - run.began_at, 1.0)
    stage.ends_with(run, 2)
    stage.expect(re.search("needs .* of /dev/shm, and .* are free", run.text), "what is needed is not told")
    stage.expect("Lower ring.max_tokens" in run.text, "the setting to change is not named")
    stage.expect(not list(stage.directory.glob("note-loaded-*")) and not run.session, "something was started")
    late = stage.launch("loop", "ring.max_tokens=262144", teacher="large")
    late.note("loading")
    stage.ends_with(late, 2)
    stage.expect(re.search("of /dev/shm, and", late.text) and "Lower ring.max_tokens" in late.text, late.last_words)
    stage.says(
        "exit 2 with the plan's table and the setting; where only the loaded teacher can tell: the same, at the barrier"
    )


def garbled_segments(stage: Stage) -> None:
    run = _play(stage, "segments")
    found = [line.split("\t") for _, line in run.lines if line.count("\t") == 3]
    for kind, seconds, outcome, text in found:
        stage.took(f"{kind}: {outcome}", float(seconds), 1.0)
        allowed = ("AttachError", "attached", "LauncherDied") if kind.startswith("random") else ("AttachError",)
        stage.expect(outcome in allowed, f"{kind}: {outcome} {text}")
    kinds = {kind for kind, *_ in found if not kind.startswith("random")}
    trials = [outcome for kind, _, outcome, _ in found if kind.startswith("random")]
    stage.expect(
        len(kinds) == 7 and len(trials) == 300, f"{len(kinds)} of 7 kinds, {len(trials)} of 300 trials told their end"
    )
    stage.says(
        f"{len(kinds)} kinds, each an AttachError with found and expected; {len(trials)} randomly garbled: "
        f"{trials.count('AttachError')} AttachError, {len(trials) - trials.count('AttachError')} harmless, no signal"
    )


def names_and_others(stage: Stage) -> None:
    runtime = {"XDG_RUNTIME_DIR": str(stage.directory)}
    run = stage.launch("loop", "--name", "exp", **runtime)
    for rank in (0, 1):
        run.note(f"trains-{rank}")
    objects = sorted(run.objects)
    second = stage.launch("loop", "--name", "exp", **runtime)
    stage.took("the refusal of a second launcher", second.end() - second.began_at, 1.0)
    stage.ends_with(second, 2)
    stage.expect(f"held by a live launcher (pid {run.process.pid}" in second.text, f"it says: {second.last_words}")
    stage.expect(sorted(run.objects) == objects, "the live session lost objects")
    (stage.directory / "note-enough").touch()
    stage.ends_with(run, 0)
    others = "another user's segment: not tried, needs root"
    if os.geteuid() == 0:
        foreign = _play(stage, "others")
        stage.expect("AttachError" in foreign.text and "belongs to uid 65534" in foreign.text, foreign.last_words)
        stage.expect("kept" in foreign.text, "another user's session was reclaimed")
        others = "another user's segment: AttachError, and never reclaimed"
    stage.says(f"second launcher: exit 2, names the holder's pid; the first trained on, exit 0; {others}")


def other_vocabulary(stage: Stage) -> None:
    run = stage.launch("other_vocabulary", "payload.logits={dtype: float32}")
    fault, _ = run.note("fault")
    at, text = run.note("raised-0")
    stage.took("ParityError, from the call of wait_ready", at - fault, 60.0)
    stage.expect(re.search(r"128 words.* 120\b.*payload\.vocab=120", text, re.S), f"it says: {text!r}")
    stage.root_cause(run, 1, "rank [01]", "vocabulary")
    stage.says(f"exit 1, ParityError: {text}")


def _play(stage: Stage, what: str) -> Run:
    """A torch-free process of its own, because some of it may crash."""
    run = stage.start(python("faultlines.attaching", what), PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'scripts'}")
    stage.expect(run.code == 0, f"it ended with {run.code}: {run.last_words}")
    stage.leaves_nothing(run)
    return run
