"""The control of a training on the student's own samples, which shares no code with OnPolicyDistillationMixin."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import torch

from shmbridge.integrations.transformers import OnPolicyDistillationConfig
from shmbridge.losses import candidate_reverse_kl
from tests.distilling import CANDIDATES, END, PAD, Control, pad


class SamplingControl(Control):
    """Samples token by token, without a cache, in the turn of each optimizer step."""

    loss: OnPolicyDistillationConfig

    def get_batch_samples(self, epoch_iterator, num_batches, *args, **kwargs):
        step = self.state.global_step
        if self.is_sampled(step):
            epoch_iterator = self.samples(epoch_iterator, num_batches, step)
        return super().get_batch_samples(epoch_iterator, num_batches, *args, **kwargs)

    def is_sampled(self, step: int) -> bool:
        return random.Random(f"{self.args.seed} {step}").random() < self.loss.on_policy

    def samples(self, batches, count, step) -> Iterator[dict[str, torch.Tensor]]:
        for number, batch in enumerate(islice(batches, count)):
            name = f"{self.args.seed} {self.args.process_index} {step} {number}"
            with torch.random.fork_rng():
                torch.manual_seed(random.Random(name).getrandbits(63))
                yield self.sample(batch)

    @torch.no_grad()
    def sample(self, batch):
        prompts = []
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            prompts.append(ids[: next(place for place, label in enumerate(labels) if label != -100)])
        longest = max(map(len, prompts))
        ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        rows = [{"input_ids": list(prompt), "labels": [-100] * len(prompt)} for prompt in prompts]
        going_on = set(range(len(rows)))
        self.model.eval()
        for _ in range(self.loss.max_new_tokens):
            if not going_on:
                break
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
            drawn = torch.multinomial((logits / self.loss.sampling_temperature).softmax(-1), 1)
            for number in list(going_on):
                token = int(drawn[number])
                rows[number]["input_ids"].append(token)
                rows[number]["labels"].append(token)
                going_on -= {number} if token == END else set()
            ids, mask = torch.cat((ids, drawn), 1), torch.cat((mask, torch.ones_like(drawn)), 1)
        self.model.train()
        batch = pad(rows)
        lengths = torch.tensor([len(row["labels"]) for row in rows])
        return {**batch, "attention_mask": (torch.arange(batch["labels"].shape[1]) < lengths[:, None]).long()}

    def divergence(self, student, teacher, labels):
        if self.loss.loss != "candidate_reverse_kl":
            return super().divergence(student, teacher, labels)
        # Its formula is held against float64 by tests/unit/test_candidate_reverse_kl.py.
        chosen = student.detach().topk(CANDIDATES).indices
        logs = teacher.log_softmax(-1)
        sampled = {}
        if self.model.training and self.is_sampled(self.state.global_step):
            of_labels = logs.gather(-1, labels[:, None])[:, 0]
            sampled = {"sampled": labels, "sampled_logprobs": of_labels}
        return candidate_reverse_kl(student, chosen, logs.gather(-1, chosen), num_items=1, **sampled)
