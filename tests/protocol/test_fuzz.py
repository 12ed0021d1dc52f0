"""Garbled bytes, sizes, modes and owners, by the thousand: see fuzz.py. And what the fuzz has found."""

from __future__ import annotations

import re

import pytest

from shmbridge import config
from shmbridge.errors import AttachError, ConfigError
from shmbridge.output_spec import Offer
from shmbridge.shm import layout
from shmbridge.shm.layout import RECORD_BYTES
from shmbridge.shm.participant_record import Record
from tests.protocol.running import module


@pytest.mark.promise(19, within="1 s")
@pytest.mark.parametrize("cases", [pytest.param(2000, marks=pytest.mark.slow), 600])
@pytest.mark.parametrize("chunks", ["0", "2"])
def test_whatever_is_garbled_is_refused_or_does_no_harm(chunks, cases, promise):
    status, text = module("fuzz", "--cases", str(cases), "--chunks", chunks)
    assert status == 0, text
    refused, slowest_s = re.search(r"cases, (\d+) refused, .* slowest (\S+) s", text).groups()
    assert int(refused) > 0.15 * cases, "hardly anything was garbled"
    promise.kept(f"{cases} garbled sessions: AttachError or harmless, no signal", float(slowest_s))


def record_with(field: layout.Text, nbytes: int, text: bytes) -> Record:
    record = Record(memoryview(bytearray(RECORD_BYTES)), "teacher", 0)
    record.memory[field.offset : field.offset + len(text)] = text
    record.words[field.word] = nbytes
    return record


def test_a_text_that_is_longer_than_its_field_is_named():
    with pytest.raises(AttachError, match="16385 bytes where 16384 fit"):
        record_with(layout.OFFER, layout.OFFER.capacity + 1, b"").offer  # noqa: B018


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda: config.from_json(b'{"\xff": 1}'), ConfigError),
        (lambda: Offer.decode(b'{"outputs": [], "model": "\xff"}'), AttachError),
        (lambda: record_with(layout.FAILURE, 13, b'{"role": "\xff"}').failure, AttachError),
    ],
    ids=["settings", "offer", "failure"],
)
def test_a_text_that_is_no_utf8_is_named(read, error):
    """msgspec raises UnicodeDecodeError, which is no DecodeError, for it."""
    with pytest.raises(error):
        read()
