"""Log files on the terminal: whole lines, a prefix, the last state of a progress bar, the last traceback."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TextIO

import pytest

from launcher.console import Console
from launcher.logs import KEPT_LINES, Logs


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
    append(path, b"o\nthree")
    logs.pump()
    logs.finish()
    assert stream.getvalue() == "[teacher]  one\n[teacher]  two\n[teacher]  three\n"


def test_a_progress_bar_shows_its_last_state(tmp_path):
    logs, path, stream = follow(tmp_path)
    append(path, b"\r 0 %\r50 %" + b"\r75 %" * 50_000)
    logs.pump()
    append(path, b"\r100 %\n")
    logs.pump()
    assert stream.getvalue() == "[teacher]  100 %\n"


def test_a_line_that_never_ends_takes_bounded_memory(tmp_path):
    logs, path, _ = follow(tmp_path)
    append(path, b"x" * 10_000_000)
    logs.finish()
    assert len(logs.last_lines("teacher")[0]) <= 64 * 1024


def test_bytes_that_are_no_text_are_shown(tmp_path):
    logs, path, stream = follow(tmp_path)
    append(path, b"\xff\n")
    logs.pump()
    assert stream.getvalue() == "[teacher]  \ufffd\n"


def test_the_last_lines_are_kept(tmp_path):
    logs, path, _ = follow(tmp_path)
    append(path, b"".join(b"%d\n" % i for i in range(1000)))
    logs.pump()
    assert logs.last_lines("teacher") == [str(i) for i in range(1000 - KEPT_LINES, 1000)]


@pytest.mark.parametrize("prefix", [b"", b"[rank0]: "])
def test_a_traceback_is_kept_though_a_chatty_log_follows(tmp_path, prefix):
    logs, path, _ = follow(tmp_path)
    lines = [b"Traceback (most recent call last):", b'  File "x.py", line 1', b"ValueError: boom"]
    append(path, b"".join(prefix + line + b"\n" for line in lines) + b"chatter\n" * 1000)
    logs.pump()
    assert logs.last_lines("teacher") == [line.decode() for line in lines]


def test_a_traceback_of_a_tee_is_kept_whole(tmp_path):
    logs, path, _ = follow(tmp_path)
    lines = [b"Traceback (most recent call last):", b'  File "x.py", line 1', b"ValueError: boom"]
    append(path, b"".join(b"[default1]:[rank1]: " + line + b"\n" for line in lines))
    logs.pump()
    assert logs.last_lines("teacher") == [line.decode() for line in lines]


def test_a_traceback_after_a_line_longer_than_a_read_is_kept(tmp_path):
    logs, path, _ = follow(tmp_path)
    append(path, b"x" * (5 * 2**19) + b"\nTraceback (most recent call last):\n  f\nValueError: the cause\n")
    logs.finish()
    assert logs.last_lines("teacher") == ["Traceback (most recent call last):", "  f", "ValueError: the cause"]


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


def test_longer_names_make_room_in_front_of_every_line(tmp_path):
    stream = io.StringIO()
    console = Console(stream)
    console.expect("teacher 1")
    console.line("teacher 1", "one")
    console.say("two")
    assert stream.getvalue() == "[teacher 1] one\n[launcher]  two\n"
