"""A tiny Llama with its tokenizer as a .gguf file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCAB, WIDTH, INNER, LAYERS, HEADS, POSITIONS = 300, 32, 64, 2, 2, 128


def write(path: Path) -> None:
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer)
    _add_weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter) -> None:
    """Byte-level BPE: every byte, and merges of neighbours up to VOCAB."""
    letters = list(bytes_to_unicode().values())
    pairs = list(pairwise(letters))[: VOCAB - 1 - len(letters)]
    tokens = ["<|end|>", *letters, *(a + b for a, b in pairs)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (VOCAB - 1))
    writer.add_token_merges([f"{a} {b}" for a, b in pairs])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


def _add_weights(writer: GGUFWriter) -> None:
    generator = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(f"{name}.weight", generator.standard_normal((rows, columns), dtype=np.float32) * 0.05)

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    matrix("token_embd", VOCAB, WIDTH)
    matrix("output", VOCAB, WIDTH)
    ones("output_norm")
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{i}.{name}", WIDTH, WIDTH)
        matrix(f"blk.{i}.ffn_gate", INNER, WIDTH)
        matrix(f"blk.{i}.ffn_up", INNER, WIDTH)
        matrix(f"blk.{i}.ffn_down", WIDTH, INNER)
        ones(f"blk.{i}.attn_norm")
        ones(f"blk.{i}.ffn_norm")
