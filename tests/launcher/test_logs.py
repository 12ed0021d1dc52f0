"""Log files on the terminal: whole lines, a prefix, the last state of a progress bar, the last traceback."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest

from launcher.console.logs import KEPT_LINES, Logs
from launcher.console.terminal import Console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def follow(tmp_path: Path, ranks: int = 0) -> tuple[Logs, Path, io.StringIO]:
    stream = io.StringIO()
    logs = Logs(Console(stream), tmp_path / "train", ranks)
    path = tmp_path / "teacher.log"
    logs.follow("teacher", path)
    return logs, path, stream


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_only_whole_lines_are_shown_until_the_end(tmp_path):
    logs, path, stream = follow(tmp_path)
    logs.pump()
    append(path, b"one\ntw")
    logs.pump()
    assert stream.getvalue() == "[teacher]  one\n"
    append(path, b"o\nno text: \xff")
    logs.pump()
    logs.finish()
    assert stream.getvalue() == "[teacher]  one\n[teacher]  two\n[teacher]  no text: \ufffd\n"


def test_a_progress_bar_shows_its_last_state(tmp_path):
    logs, path, stream = follow(tmp_path)
    append(path, b"\r 0 %\r50 %" + b"\r75 %" * 50_000)
    logs.pump()
    append(path, b"\r100 %\n")
    logs.pump()
    assert stream.getvalue() == "[teacher]  100 %\n"


def rendered(written: str) -> list[str]:
    """The screen of a terminal that was given `written`."""
    screen, row, column = [""], 0, 0
    for part in re.findall(r"\033\[\d*[A-Za-z]|.|\n|\r", re.sub(r"\033\[\d+m", "", written)):
        if part == "\n":
            row, column = row + 1, 0
            screen += [""] * (row + 1 - len(screen))
        elif part == "\r":
            column = 0
        elif part == "\033[J":
            screen = [*screen[:row], screen[row][:column]]
        elif part.startswith("\033"):
            assert part.endswith("A")
            row -= int(part[2:-1])
        else:
            screen[row] = screen[row][:column].ljust(column) + part + screen[row][column + 1 :]
            column += 1
    return screen


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Time stands still until a test moves it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("launcher.console.logs.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def two_ranks(tmp_path) -> Callable[[io.StringIO], tuple[Logs, Path, Path]]:
    def follow_two(stream: io.StringIO) -> tuple[Logs, Path, Path]:
        logs = Logs(Console(stream), tmp_path / "train", 0)
        paths = [tmp_path / "0.log", tmp_path / "1.log"]
        for rank, path in enumerate(paths):
            logs.follow(f"rank {rank}", path)
        return logs, *paths

    return follow_two


def test_bars_of_several_ranks_are_drawn_again_below_the_lines(two_ranks, clock):
    logs, first, second = two_ranks(terminal := Terminal())
    append(first, b"starts\n\r 10%\r 20%")
    append(second, b"\r 12%")
    logs.pump()
    assert rendered(terminal.getvalue()) == ["[rank 0]   starts", "[rank 0]    20%", "[rank 1]    12%"]
    append(first, b"\r 30%")
    clock.now += 0.9
    logs.pump()
    assert rendered(terminal.getvalue())[1] == "[rank 0]    20%", "once a second"
    clock.now += 0.1
    logs.pump()
    append(second, b"\r100%\nsaved\n")
    logs.pump()
    assert rendered(terminal.getvalue()) == [
        "[rank 0]   starts",
        "[rank 1]   100%",
        "[rank 1]   saved",
        "[rank 0]    30%",
    ]
    append(first, b"\r      \rwritten above the bar\n\r 31%")
    logs.pump()
    logs.finish()
    assert rendered(terminal.getvalue())[-3:] == ["[rank 0]   written above the bar", "[rank 0]    31%", ""]


def test_elsewhere_a_bar_is_a_line_every_ten_seconds(two_ranks, clock):
    logs, first, _ = two_ranks(stream := io.StringIO())
    for percent in range(100):
        append(first, b"\r%d%%" % percent)
        logs.pump()
        clock.now += 0.35
    append(first, b"\r100%\n")
    logs.pump()
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["29%", "58%", "87%", "100%"]


def test_nested_bars_are_one_that_changes(two_ranks, clock):
    """As tqdm draws them: down a line, the inner bar, up again."""
    logs, first, _ = two_ranks(terminal := Terminal())
    append(first, b"\router 1/2")
    for step in range(50):
        append(first, b"\n\rinner %d/50\033[A" % step)
        logs.pump()
        clock.now += 0.1
    append(first, b"\router 2/2\n")
    logs.pump()
    assert rendered(terminal.getvalue()) == ["[rank 0]   outer 2/2", ""]


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_prompt_is_shown_after_a_moment_and_answered(two_ranks, clock, stream):
    logs, first, _ = two_ranks(shown := stream())
    append(first, b"> train.py(3)\n(Pdb) ")
    logs.pump()
    assert "(Pdb)" not in shown.getvalue()
    clock.now += 0.5
    logs.pump()
    assert rendered(shown.getvalue())[1].rstrip() == "[rank 0]   (Pdb)"
    append(first, b"3\n(Pdb) ")
    logs.pump()
    answer = ["[rank 0]   (Pdb) 3"] if stream is Terminal else ["[rank 0]   (Pdb)", "[rank 0]   (Pdb) 3"]
    assert rendered(shown.getvalue())[1:-1] == answer


def test_a_line_that_never_ends_takes_bounded_memory(tmp_path):
    logs, path, _ = follow(tmp_path)
    append(path, b"x" * 10_000_000)
    logs.finish()
    assert len(logs.last_lines("teacher")[0]) <= 64 * 1024


def test_the_last_lines_are_kept(tmp_path):
    logs, path, _ = follow(tmp_path)
    append(path, b"".join(b"%d\n" % i for i in range(1000)))
    logs.pump()
    assert logs.last_lines("teacher") == [str(i) for i in range(1000 - KEPT_LINES, 1000)]


@pytest.mark.parametrize(
    ("prefix", "before", "after"),
    [
        (b"", b"", b"chatter\n" * 1000),
        (b"[rank0]: ", b"", b"chatter\n" * 1000),
        (b"[default1]:[rank1]: ", b"", b""),  # as torchrun's --tee writes it
        (b"", b"x" * (5 * 2**19) + b"\n", b""),  # a line that is longer than a read
    ],
    ids=["plain", "rank", "tee", "long"],
)
def test_the_last_traceback_is_kept_whole(tmp_path, prefix, before, after):
    logs, path, _ = follow(tmp_path)
    lines = [b"Traceback (most recent call last):", b'  File "x.py", line 1', b"ValueError: boom"]
    append(path, before + b"".join(prefix + line + b"\n" for line in lines) + after)
    logs.finish()
    assert logs.last_lines("teacher")[: len(lines)] == [line.decode() for line in lines]


def raised(last: str) -> list[str]:
    return ["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', last]


@pytest.mark.parametrize("failed", [False, True])
def test_a_traceback_is_one_line_where_the_run_has_failed_by_the_time_it_is_shown(tmp_path, failed):
    """The launcher looks for a failure between two calls, and its report has the traceback."""
    logs, path, stream = follow(tmp_path)
    lines = ["before", *raised("ValueError: boom"), "after"]
    append(path, "".join(f"{line}\n" for line in lines).encode())
    logs.pump()
    assert stream.getvalue() == "[teacher]  before\n"
    logs.failed = failed
    logs.pump()
    shown = ["before", f"ValueError: boom [traceback: {path}]", "after"] if failed else lines
    assert stream.getvalue().splitlines() == [f"[teacher]  {line}" for line in shown]
    assert logs.last_lines("teacher") == raised("ValueError: boom")


CHAINED = [
    *raised("KeyError: 1"),
    "",
    "During handling of the above exception, another exception occurred:",
    "",
    *raised("ValueError: boom"),
]
GROUP = [
    "  + Exception Group Traceback (most recent call last):",
    '  |   File "x.py", line 1, in <module>',
    "  | ExceptionGroup: several (2 sub-exceptions)",
    "  +-+---------------- 1 ----------------",
    "    | Traceback (most recent call last):",
    '    |   File "x.py", line 2, in <module>',
    "    | ValueError: one",
    "    +---------------- 2 ----------------",
    "    | TypeError: two",
    "    +------------------------------------",
]


@pytest.mark.parametrize(
    ("traceback", "error"),
    [(CHAINED, "ValueError: boom"), (GROUP, "ExceptionGroup: several (2 sub-exceptions)")],
    ids=["chained", "group"],
)
@pytest.mark.parametrize("failed", [False, True])
def test_exceptions_that_belong_together_are_one_traceback(tmp_path, traceback, error, failed):
    logs, path, stream = follow(tmp_path)
    append(path, "".join(f"{line}\n" for line in ["before", *traceback, "after"]).encode())
    logs.failed = failed
    logs.pump()
    logs.pump()
    shown = ["before", *([f"{error} [traceback: {path}]"] if failed else traceback), "after"]
    assert stream.getvalue().splitlines() == [f"[teacher]  {line}".rstrip() for line in shown]
    assert logs.last_lines("teacher") == traceback


def test_a_traceback_that_is_written_slowly_is_held_until_it_stands_still(tmp_path, clock):
    logs, path, stream = follow(tmp_path)
    first, *rest = raised("ValueError: boom")
    append(path, f"{first}\n".encode())
    for line in rest:
        logs.pump()
        clock.now += 0.4
        logs.pump()
        assert not stream.getvalue()
        append(path, f"{line}\n".encode())
    logs.pump()
    logs.failed = True
    logs.pump()
    assert stream.getvalue() == f"[teacher]  ValueError: boom [traceback: {path}]\n"
    assert logs.last_lines("teacher") == raised("ValueError: boom")
    append(path, f"{first}\n".encode())
    logs.pump()
    clock.now += 0.5
    logs.pump()
    assert stream.getvalue().splitlines()[1:] == [f"[teacher]  {first}"]


def test_a_traceback_that_a_script_outlived_is_not_the_end_of_its_log(tmp_path):
    logs, path, _ = follow(tmp_path)
    append(path, "".join(f"{line}\n" for line in raised("ValueError: boom")).encode())
    logs.finish()
    assert logs.raised("teacher") == "ValueError: boom"
    chatter = [str(i) for i in range(KEPT_LINES)]
    append(path, "".join(f"{line}\n" for line in chatter).encode())
    logs.finish()
    assert logs.raised("teacher") == ""
    assert logs.last_lines("teacher") == [*raised("ValueError: boom"), "...", *chatter]


def test_a_traceback_that_follows_from_another_failure_is_one_line(tmp_path):
    logs, path, stream = follow(tmp_path)
    for kind in ("TeacherDied", "TrainerDied", "LauncherDied", "RunStopped"):
        append(path, "".join(f"{line}\n" for line in raised(f"shmbridge.errors.{kind}: gone")).encode())
    logs.pump()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == [
        f"shmbridge.errors.{kind}:" for kind in ("TeacherDied", "TrainerDied", "LauncherDied", "RunStopped")
    ]


def test_what_torchrun_says_of_a_failed_run_is_in_its_log_alone(tmp_path):
    """As torch 2.x logs it; the report tells the same of the rank that came first."""
    logs, path, stream = follow(tmp_path)
    says = b"E1130 21:48:58.383000 3288 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 1)\n"
    append(path, says)
    logs.pump()
    logs.failed = True
    append(path, says + b"a rank\n")
    logs.pump()
    assert [line.split()[-1] for line in stream.getvalue().splitlines()] == ["1)", "rank"]


def pipe() -> tuple[int, TextIO]:
    """A pipe whose writing end does not block, as a terminal is that a Node.js program has set up."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    return read, open(write, "w")


def drain(read: int) -> bytes:
    found = b""
    while True:
        try:
            found += os.read(read, 2**20)
        except BlockingIOError:
            return found


def test_a_stream_that_takes_nothing_now_gets_it_later():
    read, stream = pipe()
    console = Console(stream)
    lines = [f"{i:99}" for i in range(5000)]
    for line in lines:
        console.write(line + "\n")
        console.flush()
    assert console.behind
    found = b""
    while console.behind:
        found += drain(read)
        console.flush()
    assert (found + drain(read)).decode().splitlines() == lines
    os.close(read)
    stream.close()


def test_a_stream_that_nobody_reads_takes_bounded_memory_and_is_told():
    read, stream = pipe()
    console = Console(stream)
    for _ in range(12):
        console.write("x" * 2**20 + "\n")
    found = b""
    while console.behind:
        found += drain(read)
        console.flush()
    assert b"bytes are not shown here" in (found + drain(read)).splitlines()[-1]
    os.close(read)
    stream.close()


def test_a_stream_whose_reader_has_gone_ends_nothing():
    read, stream = pipe()
    os.close(read)
    console = Console(stream)
    console.say("x")
    console.say("y")
    assert not console.behind
    stream.close()


def test_ranks_are_found_as_torchrun_makes_their_files(tmp_path):
    logs, _, stream = follow(tmp_path, ranks=2)
    logs.pump()
    for rank in (0, 1):
        directory = tmp_path / "train" / "id_x" / "attempt_0" / str(rank)
        directory.mkdir(parents=True)
        (directory / "stdout.log").write_text(f"hello {rank}\n")
        (directory / "stderr.log").touch()
    logs.pump()
    assert stream.getvalue() == "[rank 0]   hello 0\n[rank 1]   hello 1\n"
    logs.expect(1)
    again = tmp_path / "train" / "id_y" / "attempt_0" / "0" / "stdout.log"
    again.parent.mkdir(parents=True)
    again.write_text("hello again\n")
    logs.pump()
    assert logs.paths("rank 0") == [tmp_path / "train" / name for name in ("rank0.stdout.log", "rank0-2.stdout.log")]
    assert [path.read_text() for path in logs.paths("rank 0")] == ["hello 0\n", "hello again\n"]


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = Terminal()
    colours = Console(coloured)
    colours.line("rank 1", "x")
    colours.flush()
    assert coloured.getvalue() == "\033[32m[rank 1]  \033[0m x\n"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    without = Console(plain)
    without.line("rank 1", "x")
    without.flush()
    assert plain.getvalue() == "[rank 1]   x\n"


def test_lines_of_the_launcher_are_wrapped_below_their_column_on_a_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    for stream in (Terminal(), io.StringIO()):  # a terminal that does not know its size has 80 columns
        console = Console(stream)
        text = "plane     host: no GPUs on both sides (the teacher and training are on the CPU of this machine)"
        console.say(f"{text}\nrun       runs/x")
        lines = stream.getvalue().splitlines()
        if stream.isatty():
            assert max(map(len, lines)) <= 80
            assert lines[1].startswith("[launcher]           ") and lines[1].endswith("machine)")
        else:
            assert lines[0] == f"[launcher] {text}"
        assert lines[-1] == "[launcher] run       runs/x"


def test_a_page_is_wrapped_on_a_terminal_but_for_what_it_quotes():
    terminal = Terminal()
    console = Console(terminal)
    quoted = "    File " + "x" * 100
    console.page(f"  next    {'word ' * 30}\n{quoted}")
    console.flush()
    first, second, *_, last = terminal.getvalue().splitlines()
    assert first.startswith("  next    word") and second.startswith("          word")
    assert max(len(first), len(second)) <= 80
    assert last == quoted


def test_longer_names_make_room_in_front_of_every_line(tmp_path):
    stream = io.StringIO()
    console = Console(stream)
    console.expect("teacher 1")
    console.line("teacher 1", "one")
    console.say("two")
    assert stream.getvalue() == "[teacher 1] one\n[launcher]  two\n"
