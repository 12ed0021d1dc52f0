"""A student that is cut out of its teacher."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from shmbridge.losses import Head


def cut(base: str, layers: int) -> torch.nn.Module:
    """Every n-th layer of the model `base`, the first and the last among them, as in DistilBERT (Sanh et al. 2019).

    The result is in float32. Its embeddings and its output head are the teacher's, and frozen. Such a cut predicts worse than
    a uniform guess over the vocabulary, and it learns fast. Any decoder of Llama's shape in transformers can be cut.

    Raises:
        SystemExit: `base` has fewer layers than `layers`.
    """
    student = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    depth = len(student.model.layers)
    if layers > depth:
        raise SystemExit(f"--layers is {layers}, but {base} has {depth} layers; give --layers {depth} or fewer")
    kept = torch.linspace(0, depth - 1, layers).round().long().tolist()
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept)
    for i, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = i  # of its keys and values in generate's cache
    student.config.num_hidden_layers = layers
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[i] for i in kept]
    student.get_input_embeddings().requires_grad_(False)
    student.get_output_embeddings().requires_grad_(False)
    return student


def hidden_states(trunk: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """What the output head is given: (batch, seq, width)."""
    return trunk(input_ids=input_ids, use_cache=False).last_hidden_state


def head_of(student: torch.nn.Module) -> Head:
    module = student.get_output_embeddings()
    return Head(module.weight, module.bias)


def parameters(student: torch.nn.Module, *, trained: bool = False) -> int:
    """How many parameters it has, or how many of them are trained."""
    return sum(weight.numel() for weight in student.parameters() if weight.requires_grad or not trained)
