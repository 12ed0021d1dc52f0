"""The parity check at the barrier: it passes for a teacher that is the model, and names what is wrong with one that is not."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from shmbridge import config
from shmbridge.errors import ConfigError, ParityError, PlanError
from shmbridge.head import Head
from shmbridge.rank.bridge import Bridge
from shmbridge.rank.in_flight import Requests
from shmbridge.rank.reply import Reply
from shmbridge.rank.request import Request
from shmbridge.teacher import batch, output_discovery
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.huggingface import HuggingFaceTeacher
from tests.harness import Echo, bench
from tests.models import EVERYTHING, WORDS, build, join, load, saved, serving  # noqa: F401
from tests.process.test_bridge import ids

Tensors = dict[str, torch.Tensor]


def kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    p, q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def of_logits(student: torch.Tensor, reply: Reply) -> torch.Tensor:
    return kl(student, reply.logits)


def topk_kl(student: torch.Tensor, reply: Reply) -> torch.Tensor:
    """Over the top words, and all others as one."""
    q = torch.log_softmax(student, -1)
    ids = reply["topk_ids"].long()
    rest = q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    p, q = reply["topk_logprobs"], q.gather(-1, ids)
    tail = reply["tail_logmass"][..., 0]
    return ((p.exp() * (p - q)).sum(-1) + tail.exp() * (tail - rest)).mean()


@pytest.fixture
def messages() -> list[str]:
    """What shmbridge logs in the test's own process."""
    found: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: found.append(record.getMessage())
    logger = logging.getLogger("shmbridge")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(level)


class Changed:
    """A teacher that is the model but for one change; what the model itself gives is told by its `reference`."""

    def __init__(self, loaded: HuggingFaceTeacher, change: Callable[[Tensors], Tensors]) -> None:
        self._loaded = loaded
        self._change = change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def __call__(self, batch: Batch) -> Tensors:
        return self._change(dict(self._loaded(batch)))


class ChangedLogits(Changed):
    """The same, with the model's logits in its hands instead of a head."""

    head = None

    def __call__(self, batch: Batch) -> Tensors:
        return self._change({"logits": self._loaded.reference(batch)["logits"]})


class WithHead(Changed):
    """The same, with a change of the head."""

    def __init__(self, loaded: HuggingFaceTeacher, change: Callable[[Head], Head]) -> None:
        super().__init__(loaded, lambda tensors: tensors)
        self.head = change(loaded.head)


# Passing


PASSED = "logits, topk_logprobs, topk_ids, tail_logmass, logprobs, entropy, candidate_logprobs, hidden"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_that_is_the_model_passes_with_every_payload_and_one_line(saved, messages, dtype):  # noqa: F811
    with serving(saved("Llama", dtype), *EVERYTHING, "parity=true") as it, it.bridge() as bridge:
        bridge.wait_ready(vocab_size=WORDS, loss=of_logits)
        (line,) = messages
        assert line.startswith("parity check passed: token IDs")
        for part in (PASSED, "vocabulary of 1000", "loss of teacher and teacher"):
            assert part in line
        bridge.wait_ready()
        bridge.exchange(ids(2, 4))
        assert len(messages) == 1, "once is enough"


@pytest.mark.parametrize("payload", ["logits", "topk", "logprobs", "hidden"])
def test_each_payload_passes_alone(saved, messages, payload):  # noqa: F811
    losses = {
        "logits": of_logits,
        "topk": topk_kl,
        "hidden": lambda s, r: kl(s, bridge.head(r.hidden)),
        "logprobs": of_logits,
    }
    with serving(saved(), f"payload.{payload}={{}}", "parity=true") as it, it.bridge() as bridge:
        bridge.wait_ready(loss=losses[payload])
        told = (
            "no loss: this payload does not tell a distribution"
            if payload == "logprobs"
            else "loss of teacher and teacher"
        )
        assert told in messages[0]


def test_only_rank_0_tells(saved, tmp_path):  # noqa: F811
    def body(bridge: Bridge) -> None:
        trail = logging.FileHandler(tmp_path / f"rank{bridge.rank}")
        logger = logging.getLogger("shmbridge")
        logger.setLevel(logging.INFO)
        logger.addHandler(trail)
        bridge.wait_ready(vocab_size=WORDS)
        bridge.exchange(ids(1 + bridge.rank, 5))

    with serving(saved(), *EVERYTHING, "parity=true", "teacher.collect=lockstep", lanes=3) as it:
        join(it, body, 3)
    lines = [(tmp_path / f"rank{rank}").read_text().splitlines() for rank in range(3)]
    assert [len(found) for found in lines] == [1, 0, 0]
    assert lines[0][0].startswith("parity check passed")


def test_the_first_request_checks_where_nobody_called_wait_ready(saved, messages):  # noqa: F811
    with serving(saved(), "parity=true") as it, it.bridge() as bridge:
        bridge.exchange(ids(1, 4))
        assert len(messages) == 1


def test_a_teacher_of_ones_own_is_compared_with_itself(messages):
    class Own(Echo):
        def __call__(self, batch: Batch) -> Tensors:
            return {**super().__call__(batch), "pooled": batch.input_ids.float().mean(1)}

    with bench(1, "parity=true") as it:
        it.teacher(Own())
        with it.bridge() as bridge:
            bridge.wait_ready(vocab_size=77)  # its distribution, if it has one, is not known
            assert messages == ["parity check passed: token IDs, ids, mask, shape, pooled"]


# Failing


def shifted(tensors: Tensors) -> Tensors:
    return {name: tensor.roll(1, 1) for name, tensor in tensors.items()}


def halved(tensors: Tensors) -> Tensors:
    return {"logits": tensors["logits"] / 2}


def with_holes(tensors: Tensors) -> Tensors:
    return {"logits": tensors["logits"].index_fill(-1, torch.arange(990, WORDS), -torch.inf)}


def another_head(head: Head) -> Head:
    return replace(head, weight=head.weight.roll(1, 0))


CHANGES: list[tuple[Callable[[HuggingFaceTeacher], Any], str, str]] = [
    (
        lambda t: ChangedLogits(t, shifted),
        "logits",
        "payload logits: .* shifted by one position: row i holds what row i-1",
    ),
    (lambda t: Changed(t, shifted), "hidden", "payload hidden: .* shifted by one position"),
    (lambda t: ChangedLogits(t, shifted), "topk", "payload topk_logprobs: .* (shifted by one position|off by)"),
    (lambda t: ChangedLogits(t, shifted), "logprobs", r"payload logprobs: .* off by \d"),
    (
        lambda t: ChangedLogits(t, halved),
        "logits",
        r"payload logits: .* 0\.5 times what the model gives: a temperature",
    ),
    (lambda t: WithHead(t, lambda head: replace(head, scale=0.5)), "logits", r"payload logits: .* 0\.5 times"),
    (lambda t: ChangedLogits(t, halved), "topk", "payload topk_logprobs: "),
    (lambda t: ChangedLogits(t, halved), "logprobs", "payload logprobs: "),
    (
        lambda t: ChangedLogits(t, with_holes),
        "logits",
        "payload logits: .* 120 entries that are not finite, instead of 0",
    ),
    (lambda t: WithHead(t, another_head), "logits", r"payload logits: .* off by \d"),
    (lambda t: WithHead(t, another_head), "hidden", r"payload head\(hidden\): .* off by \d"),
]


@pytest.mark.parametrize(("wrap", "payload", "message"), CHANGES)
def test_a_teacher_that_is_not_the_model_is_named_with_the_check_that_failed(saved, wrap, payload, message):  # noqa: F811
    with serving(saved(), f"payload.{payload}={{}}", "parity=true", wrap=wrap) as it:
        bridge = it.bridge()
        with pytest.raises(ParityError, match=f"parity check, {message}"):
            bridge.wait_ready()
        with pytest.raises(ParityError, match="parity check"):
            bridge.submit(ids(1, 4))
        bridge.close()


def test_without_parity_the_same_teacher_is_not_questioned(saved, messages):  # noqa: F811
    with serving(saved(), "parity=false", wrap=lambda t: ChangedLogits(t, halved)) as it, it.bridge() as bridge:
        bridge.wait_ready(loss=lambda student, reply: torch.tensor(9.0))
        assert not messages
        assert it.owner.lanes[0].ring.requested == 0


def test_a_teacher_whose_answers_differ_from_call_to_call_is_told_the_way_out(saved):  # noqa: F811
    def noisy(tensors: Tensors) -> Tensors:
        return {name: tensor + torch.rand(()) for name, tensor in tensors.items()}

    with serving(saved(), "parity=true", wrap=lambda t: Changed(t, noisy)) as it:
        bridge = it.bridge()
        with pytest.raises(ParityError, match=r"differ from call to call \(dropout, sampling\), set parity=false"):
            bridge.wait_ready()
        bridge.close()


def test_garbled_ids_are_noticed_where_the_teacher_reads_them(saved, monkeypatch):  # noqa: F811
    send = Requests.send

    def garbling(self: Requests, request: Request, *rest: Any, **more: Any) -> None:
        request.ids = memoryview(bytes([request.ids[0] ^ 1, *request.ids[1:]]))
        send(self, request, *rest, **more)

    monkeypatch.setattr(Requests, "send", garbling)
    with serving(saved(), "parity=true") as it:
        bridge = it.bridge()
        with pytest.raises(
            ParityError, match=r"parity check, token IDs: the teacher read IDs with CRC 0x\w+, 0x\w+ were sent"
        ):
            bridge.wait_ready()
        bridge.close()


def test_the_echo_is_of_the_ids_whatever_their_width():
    class Asked:
        def __init__(self, kind: torch.dtype) -> None:
            self.ids = memoryview(torch.arange(6).to(kind).numpy()).cast("B")
            self.itemsize = kind.itemsize

    assert batch.echo(Asked(torch.int32)) == batch.echo(Asked(torch.int64))


@pytest.mark.parametrize(
    ("overrides", "size", "remedy"),
    [
        pytest.param(
            [],
            900,
            r"the teacher's distribution has 1000 words, the student's 900\. .* payload\.vocab=900\.",
            marks=pytest.mark.promise(21),
        ),
        ([], 1024, r"has 1000 words, the student's 1024\. .* logits\[\.\.\., :1000\]"),
        (["payload.vocab=700"], 1000, r"has 700 words, the student's 1000\. .* logits\[\.\.\., :700\]"),
    ],
)
def test_vocabularies_of_two_sizes_are_named_with_the_remedy(saved, overrides, size, remedy, promise):  # noqa: F811
    with serving(saved(), "payload.topk={}", *overrides, "parity=true") as it:
        bridge = it.bridge()
        with pytest.raises(ParityError, match=f"parity check, vocabulary: .*{remedy}") as caught:
            bridge.wait_ready(vocab_size=size)
        bridge.wait_ready(vocab_size=bridge.teacher.words)
        bridge.close()
    promise.kept(f"ParityError: {caught.value}")


@pytest.mark.parametrize(
    ("payload", "loss"),
    [
        ("logits", lambda student, reply: kl(student / 2, reply.logits)),
        ("logits", lambda student, reply: kl(student, reply.logits / 2)),
        ("logits", lambda student, reply: kl(student[:, 1:], reply.logits[:, :-1])),
        ("logits", lambda student, reply: torch.tensor(float("nan"))),
        ("topk", lambda student, reply: topk_kl(student * 4, reply)),
    ],
    ids=["student's temperature", "teacher's temperature", "shifted", "nan", "top-k"],
)
def test_a_loss_that_is_not_0_for_the_teacher_itself_is_told(saved, payload, loss):  # noqa: F811
    with serving(saved(), f"payload.{payload}={{}}", "parity=true") as it:
        bridge = it.bridge()
        with pytest.raises(ParityError, match=r"parity check, loss: of the teacher and itself it is \S+, expected 0"):
            bridge.wait_ready(loss=loss)
        bridge.close()


# Tokenizers


def tokenizer(*words: str) -> PreTrainedTokenizerFast:
    table = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(table, unk_token=words[0])), unk_token=words[0])


TABLE = [f"w{i}" for i in range(950)]


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory) -> str:
    """A model of 1000 words whose tokenizer has 950: 50 are padding."""
    path = tmp_path_factory.mktemp("with_tokenizer")
    build("Llama").save_pretrained(path)
    tokenizer(*TABLE).save_pretrained(path)
    return str(path)


def test_a_model_without_a_tokenizer_has_no_table(saved):  # noqa: F811
    assert load(saved()).tokenizer is None


def test_a_directory_without_tokenizer_files_is_no_other_tokenizer(saved, messages):  # noqa: F811
    """transformers 5 makes an empty one of the class that the model's type tells."""
    with serving(saved("GPT2"), "parity=true") as it:
        bridge = it.bridge()
        bridge.wait_ready(tokenizer=tokenizer(*TABLE), vocab_size=1000)
        assert (
            "(no tokenizer: the teacher has no tokenizer files, nothing was compared), vocabulary of 1000"
            in messages[0]
        )
        bridge.close()


def test_tokenizers_with_one_table_pass_and_others_are_named(with_tokenizer, messages):
    swapped = [TABLE[0], TABLE[2], TABLE[1], *TABLE[3:]]
    with serving(with_tokenizer, "payload.vocab=950", "parity=true") as it:
        bridge = it.bridge()
        for wrong, entries in ((swapped, 950), (TABLE[:900], 900), ([*TABLE, "more"], 951)):
            match = rf"parity check, vocabulary: the tokenizers' tables differ \(teacher: 950 entries.* student: {entries} entries"
            with pytest.raises(ParityError, match=match):
                bridge.wait_ready(tokenizer=tokenizer(*wrong))
        bridge.wait_ready(tokenizer=tokenizer(*TABLE))
        bridge.wait_ready(tokenizer=tokenizer(*TABLE), vocab_size=950)
        assert messages[0].endswith(", tokenizer")
        assert messages[1].endswith(", vocabulary of 950")
        bridge.close()


def test_words_that_the_tokenizer_has_are_no_padding(with_tokenizer):
    with serving(with_tokenizer, "parity=true") as it:
        bridge = it.bridge()
        with pytest.raises(ParityError, match="tokenizer has 950 entries: these are words and no padding"):
            bridge.wait_ready(vocab_size=900)
        with pytest.raises(ParityError, match=re.escape("cut it: payload.vocab=950")):
            bridge.wait_ready(vocab_size=950)
        bridge.close()


def test_a_payload_vocab_that_cuts_words_is_refused_before_anything_is_served(with_tokenizer):
    with pytest.raises(
        ConfigError, match=r"payload\.vocab is 949; the teacher's tokenizer has 950 entries.* to 950 or more"
    ):
        load(with_tokenizer, "payload.vocab=949")
    assert load(with_tokenizer, "payload.vocab=950").head.weight.shape[0] == 950


def test_a_teacher_that_gives_nan_is_refused_at_the_offer():
    settings = config.load(overrides=["teacher.model=tests:own", "payload.logits={}"])
    nan = lambda batch: {"logits": torch.full((*batch.input_ids.shape, 7), torch.nan)}  # noqa: E731
    with pytest.raises(PlanError, match="has 84 NaN among 84 numbers"):
        output_discovery.make(nan, settings, torch.device("cpu"))


def test_a_cut_of_the_vocabulary_needs_a_payload_to_cut():
    settings = config.load(overrides=["teacher.model=tests:own", "payload.vocab=5"])
    with pytest.raises(PlanError, match="payload.vocab is 5, and no payload is named that it could cut"):
        output_discovery.make(
            lambda batch: {"logits": torch.zeros(*batch.input_ids.shape, 7)}, settings, torch.device("cpu")
        )
