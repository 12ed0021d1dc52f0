"""Draw a run of train_student.py: `python scripts/plot_losses.py runs/demo` writes losses.png from its JSON files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

STUDENT, HELD_OUT, TEACHER = "#2166ac", "#b2182b", "#4d4d4d"


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
    draw_curve(axis, metrics, [each["kl"] for each in metrics])
    draw_held_out(axis, summary, "kl", "{:.2f}")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("KL(teacher ‖ student), nats per token")


def draw_perplexity(axis: Any, metrics: list[dict[str, float]], summary: dict[str, float]) -> None:
    draw_curve(axis, metrics, [2.718281828459045 ** each["ce"] for each in metrics])
    draw_held_out(axis, summary, "perplexity", "{:,.0f}")
    if summary["teacher_perplexity"] is not None:
        axis.axhline(summary["teacher_perplexity"], color=TEACHER, linestyle=":", label="teacher, held out")
    axis.set_yscale("log")
    axis.set_ylabel("perplexity of the next token")


def draw_curve(axis: Any, metrics: list[dict[str, float]], values: list[float]) -> None:
    steps = [each["step"] + 1 for each in metrics]
    axis.plot(steps, values, color=STUDENT, alpha=0.25, linewidth=1)
    axis.plot(steps, smooth(values), color=STUDENT, linewidth=2, label="student, training batches")
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_held_out(axis: Any, summary: dict[str, float], key: str, shape: str) -> None:
    steps, values = [0, summary["steps"]], [summary[f"{key}_before"], summary[f"{key}_after"]]
    axis.plot(steps, values, "D", color=HELD_OUT, markersize=7, zorder=3, label="student, held-out files")
    for step, value in zip(steps, values, strict=True):
        axis.annotate(shape.format(value), (step, value), (8, 6), textcoords="offset points", color=HELD_OUT)
    axis.margins(x=0.08)
    axis.legend(frameon=False)


def smooth(values: list[float], keep: float = 0.8) -> list[float]:
    """An exponential moving average, corrected for its start."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = keep * total + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed


def title(summary: dict[str, float]) -> str:
    what = "Online distillation" if summary["kl_after"] is not None else "Training without a teacher"
    return (
        f"{what} on Python's standard library: {summary['student_layers']} layers, "
        f"{summary['tokens']:,} tokens on {summary['ranks']} ranks in {summary['seconds']:.0f} s"
    )


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
