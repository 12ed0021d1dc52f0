"""Draw a run of the demo: `python scripts/demo/plot.py runs/demo` writes losses.png from the JSON files there."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

COLOURS = {"distilled": "#2166ac", "text alone": "#d6604d"}
AVERAGED = 9  # steps


def plot(out: Path) -> None:
    """losses.png in `out`: the KL to the teacher and the perplexity of both students, over the steps.

    The scores before training are far above the rest and stand in the titles.
    """
    summary = json.loads((out / "summary.json").read_text())
    figure, (kl, perplexity) = plt.subplots(1, 2, figsize=(10.5, 5.2))
    before = summary["students"]["distilled"]["held_out"][0]
    draw_training(kl, out, "distilled", lambda loss: loss)
    draw_training(perplexity, out, "text alone", math.exp)
    for name, student in summary["students"].items():
        draw_held_out(kl, name, student, "kl", "{:.2f}")
        draw_held_out(perplexity, name, student, "perplexity", "{:,.0f}")
    teacher = summary["teacher_perplexity"]
    perplexity.axhline(teacher, color="#4d4d4d", linestyle=":", label=f"teacher: {teacher:.0f}")
    perplexity.set_yscale("log")
    for axis, key, what in (
        (kl, "kl", "KL(teacher ‖ student), nats per token"),
        (perplexity, "perplexity", "perplexity of the next token"),
    ):
        first = max(student["held_out"][1][key] for student in summary["students"].values())
        axis.set_ylim(0 if key == "kl" else teacher / 2, first * (1.7 if key == "kl" else 5))
        axis.set_title(f"{what} (before: {before[key]:,.{1 if key == 'kl' else 0}f})", fontsize=10)
        axis.set_xlabel("training step")
        axis.grid(alpha=0.25)
        axis.margins(x=0.08)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13))  # below the curves
    figure.suptitle(title(summary), fontsize=11)
    figure.tight_layout()
    figure.savefig(out / "losses.png", dpi=150)
    plt.close(figure)


def draw_training(axis: Any, out: Path, name: str, of: Any) -> None:
    """What the student minimises, on its training batches."""
    lines = [json.loads(line) for line in (out / f"{name.replace(' ', '-')}.jsonl").read_text().splitlines()]
    windows = [lines[i : i + AVERAGED] for i in range(len(lines) - AVERAGED + 1)]
    steps = [window[AVERAGED // 2]["step"] for window in windows]
    values = [of(sum(line["loss"] for line in window) / AVERAGED) for window in windows]
    label = f"{name}, training batches (mean of {AVERAGED} steps)"
    axis.plot(steps, values, color=COLOURS[name], alpha=0.35, linewidth=1, label=label)


def draw_held_out(axis: Any, name: str, student: dict[str, Any], key: str, shape: str) -> None:
    """A marker for each score after the one before training, and the last one's number."""
    scores = student["held_out"][1:]
    steps, values = [each["step"] for each in scores], [each[key] for each in scores]
    label = f"{name}, held-out text ({student['seconds']:.0f} s of training)"
    axis.plot(steps, values, "o-", color=COLOURS[name], linewidth=2, markersize=5, label=label)
    axis.annotate(
        shape.format(values[-1]),
        (steps[-1], values[-1]),
        (7, -12 if name == "distilled" else 4),
        textcoords="offset points",
        color=COLOURS[name],
    )


def title(summary: dict[str, Any]) -> str:
    return (
        f"The same student of {summary['student_layers']} layers, distilled and trained on the text alone, "
        f"on the same {summary['tokens']:,} tokens"
    )


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
