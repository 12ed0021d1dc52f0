"""Garbled bytes, sizes, modes and owners, by the thousand: see fuzz.py. And what the fuzz has found."""

from __future__ import annotations

import re

import pytest

from shmbridge import config
from shmbridge.errors import AttachError, ConfigError, ShmbridgeError
from shmbridge.output_spec import Offer
from shmbridge.shm import layout
from shmbridge.shm.layout import RECORD_BYTES, RecordWord
from shmbridge.shm.record import Record
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


# msgspec raises UnicodeDecodeError, which is no DecodeError, for a string that is no UTF-8.


def test_settings_that_are_no_utf8_are_named():
    with pytest.raises(ConfigError):
        config.from_json(b'{"\xff": 1}')


def test_an_offer_that_is_no_utf8_is_named():
    with pytest.raises(AttachError):
        Offer.decode(b'{"outputs": [], "model": "\xff"}')


def test_a_failure_that_is_no_utf8_is_named():
    memory = memoryview(bytearray(RECORD_BYTES))
    text = b'{"role": "\xff"}'
    memory[layout.FAILURE.offset : layout.FAILURE.offset + len(text)] = text
    memory.cast("Q")[RecordWord.FAILURE] = len(text)
    with pytest.raises(ShmbridgeError):
        Record(memory, "teacher", 0).failure  # noqa: B018
