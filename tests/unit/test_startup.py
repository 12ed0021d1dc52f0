"""The teacher's warm-up, on the CPU: which batches are computed, and what running out of memory does."""

from __future__ import annotations

import pytest
import torch

from shmbridge import config
from shmbridge.teacher import output_discovery, startup
from shmbridge.teacher.batch import Batch
from shmbridge.teacher.grouping import TokenLimit

CPU = torch.device("cpu")
SETTINGS = config.load(
    overrides=["teacher.model=tests:teacher", "ring.max_tokens=512", "payload.topk={k: 2}", "parity=false"]
)
FULL = torch.OutOfMemoryError("CUDA out of memory")


class Model:
    """Logits of 5 words. It runs out of memory above `fits` tokens, which `full` tells, and may raise `error`."""

    vocab_size = 5
    max_seq = 64

    def __init__(self, fits: int = 10**6, error: Exception | None = None, full: Exception = FULL) -> None:
        self.fits, self.error, self.full = fits, error, full
        self.shapes: list[tuple[int, int]] = []
        self.masked = 0

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.shapes.append(tuple(batch.input_ids.shape))
        self.masked += batch.attention_mask is not None
        if batch.input_ids.numel() > self.fits:
            raise self.full
        if self.error:
            raise self.error
        assert batch.input_ids.max() < self.vocab_size
        return {"logits": torch.zeros(*batch.input_ids.shape, self.vocab_size)}


def warm_up(model: Model, settings: config.Config = SETTINGS) -> TokenLimit:
    made = Model()
    _, encoder = output_discovery.make(made, settings, CPU)
    limit = TokenLimit(settings.teacher.max_batch_tokens)
    startup.warm_up(model, encoder, limit, settings, CPU)
    return limit


def test_a_small_batch_with_and_without_a_mask_and_one_of_ring_max_tokens_are_computed():
    model = Model()
    assert warm_up(model).tokens == SETTINGS.teacher.max_batch_tokens
    assert (model.shapes, model.masked) == ([(2, 6), (2, 6), (8, 64)], 1)


def test_no_target_lies_beyond_payload_vocab(caplog):
    """On a GPU an index out of bounds would end the teacher's process."""
    overrides = [
        "teacher.model=tests:teacher",
        "ring.max_tokens=512",
        "payload={logprobs: {}, vocab: 3}",
        "parity=false",
    ]
    with caplog.at_level("INFO", "shmbridge"):
        warm_up(Model(), config.load(overrides=overrides))
    assert not caplog.messages


@pytest.mark.parametrize(("fits", "left"), [(300, 256), (100, 64), (40, 32), (0, 1)])
def test_out_of_memory_halves_the_forward_and_the_start_goes_on(fits, left):
    model = Model(fits)
    assert warm_up(model).tokens == left
    assert model.shapes[-1][0] * model.shapes[-1][1] == left


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_what_cuda_and_its_libraries_allocate_by_themselves_runs_out_of_memory_alike(said):
    """They raise no torch.OutOfMemoryError, and the GPU can be used as before."""
    assert warm_up(Model(300, full=RuntimeError(said))).tokens == 256


def test_another_error_is_the_requests_own_and_a_broken_gpu_ends_the_start():
    warm_up(Model(error=ValueError("no such words")))
    with pytest.raises(RuntimeError, match="illegal"):
        warm_up(Model(error=RuntimeError("CUDA error: an illegal memory access was encountered")))
