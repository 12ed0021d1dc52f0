"""Draw a run of train_student.py: `python scripts/plot_losses.py runs/demo` writes losses.png from its JSON files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

STUDENT, HELD_OUT, TEACHER = "#2166ac", "#b2182b", "#4d4d4d"
SIDE = 4  # steps averaged before and behind each


def plot(out: Path) -> None:
    """losses.png in `out`, from metrics.jsonl and summary.json there."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    with_teacher = summary["kl_after"] is not None
    figure, axes = plt.subplots(1, 1 + with_teacher, figsize=(5.5 * (1 + with_teacher), 4.2), squeeze=False)
    if with_teacher:
        draw_kl(axes[0, 0], metrics, summary)
    draw_perplexity(axes[0, -1], metrics, summary)
    figure.suptitle(title(summary), fontsize=11)
    figure.tight_layout()
    figure.savefig(out / "losses.png", dpi=150)
    plt.close(figure)


def draw_kl(axis: Any, metrics: list[dict[str, float]], summary: dict[str, float]) -> None:
    losses = [each["kl"] for each in metrics]
    draw_curve(axis, metrics, losses, smooth(losses))
    draw_held_out(axis, summary, "kl", "{:.2f}")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("KL(teacher ‖ student), nats per token")
    axis.legend(frameon=False)


def draw_perplexity(axis: Any, metrics: list[dict[str, float]], summary: dict[str, float]) -> None:
    losses = [each["ce"] for each in metrics if each["ce"] is not None]
    if losses:  # where it is part of what is minimised
        draw_curve(axis, metrics, *([math.exp(value) for value in values] for values in (losses, smooth(losses))))
    draw_held_out(axis, summary, "perplexity", "{:,.0f}")
    teacher = summary["teacher_perplexity"]
    if teacher is not None:
        axis.axhline(teacher, color=TEACHER, linestyle=":", label=f"teacher, held-out files: {teacher:.0f}")
    axis.set_yscale("log")
    axis.set_ylabel("perplexity of the next token")
    axis.legend(frameon=False)


def draw_curve(axis: Any, metrics: list[dict[str, float]], values: list[float], smoothed: list[float]) -> None:
    steps = [each["step"] + 1 for each in metrics]
    axis.plot(steps, values, color=STUDENT, alpha=0.3, linewidth=1, label="student, each training batch")
    axis.plot(steps, smoothed, color=STUDENT, linewidth=2, label=f"student, mean of {2 * SIDE + 1} batches")


def draw_held_out(axis: Any, summary: dict[str, float], key: str, shape: str) -> None:
    """The two scores, written to the right of the first marker and above the last."""
    steps, values = (0, summary["steps"]), (summary[f"{key}_before"], summary[f"{key}_after"])
    axis.plot(steps, values, "D", color=HELD_OUT, markersize=7, zorder=3, label="student, held-out files")
    for step, value, offset, side in zip(steps, values, ((10, -12), (0, 9)), ("left", "center"), strict=True):
        text = shape.format(value)
        axis.annotate(text, (step, value), offset, textcoords="offset points", ha=side, color=HELD_OUT)
    axis.margins(x=0.06)
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours: SIDE on either side, fewer where an end is near."""
    sides = (min(SIDE, i, len(values) - 1 - i) for i in range(len(values)))
    windows = (values[i - side : i + side + 1] for i, side in enumerate(sides))
    return [sum(window) / len(window) for window in windows]


def title(summary: dict[str, float]) -> str:
    what = "Online distillation" if summary["kl_after"] is not None else "Training without a teacher"
    return (
        f"{what} on Python's standard library: {summary['student_layers']} layers, "
        f"{summary['tokens']:,} tokens on {summary['ranks']} ranks in {summary['seconds']:.0f} s"
    )


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
