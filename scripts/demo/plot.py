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
    students, teacher = summary["students"], summary["teacher_perplexity"]
    figure, (kl, perplexity) = plt.subplots(1, 2, figsize=(10.5, 5.2))
    draw(kl, out, students, "kl", "distilled", "KL(teacher ‖ student), nats per token", digits=2)
    draw(perplexity, out, students, "perplexity", "text alone", "perplexity of the next token", digits=0)
    kl.set_ylim(0, 1.7 * first_score(students, "kl"))
    perplexity.axhline(teacher, color="#4d4d4d", linestyle=":", label=f"teacher: {teacher:.0f}")
    perplexity.set_yscale("log")
    perplexity.set_ylim(teacher / 2, 5 * first_score(students, "perplexity"))
    for axis in (kl, perplexity):
        axis.set_xlabel("training step")
        axis.grid(alpha=0.25)
        axis.margins(x=0.08)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13))  # below the curves
    figure.suptitle(
        f"The same student of {summary['student_layers']} layers, distilled and trained on the text alone, "
        f"on the same {summary['tokens']:,} tokens",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(out / "losses.png", dpi=150)
    plt.close(figure)


def first_score(students: dict[str, Any], key: str) -> float:
    """The larger of both students', after the first part of the training."""
    return max(student["held_out"][1][key] for student in students.values())


def draw(axis: Any, out: Path, students: dict[str, Any], key: str, minimises: str, title: str, digits: int) -> None:
    """The score `key` of both students on held-out text, a marker for each after the one before training; and of the student
    that minimises it the loss on its training batches."""
    before = students["distilled"]["held_out"][0][key]
    axis.set_title(f"{title} (before: {before:,.{digits and 1}f})", fontsize=10)
    told = [json.loads(line) for line in (out / f"{minimises.replace(' ', '-')}.jsonl").read_text().splitlines()]
    windows = [told[i : i + AVERAGED] for i in range(len(told) - AVERAGED + 1)]
    means = [sum(each["loss"] for each in window) / AVERAGED for window in windows]
    values = means if key == "kl" else [math.exp(mean) for mean in means]
    label = f"{minimises}, training batches (mean of {AVERAGED} steps)"
    steps = [window[AVERAGED // 2]["step"] for window in windows]
    axis.plot(steps, values, color=COLOURS[minimises], alpha=0.35, linewidth=1, label=label)
    for name, student in students.items():
        steps, values = zip(*((score["step"], score[key]) for score in student["held_out"][1:]), strict=True)
        label = f"{name}, held-out text ({student['seconds']:.0f} s of training)"
        axis.plot(steps, values, "o-", color=COLOURS[name], linewidth=2, markersize=5, label=label)
        offset = (7, -12 if name == "distilled" else 4)
        last = (f"{values[-1]:,.{digits}f}", (steps[-1], values[-1]), offset)
        axis.annotate(*last, textcoords="offset points", color=COLOURS[name])


if __name__ == "__main__":
    plot(Path(sys.argv[1]))
