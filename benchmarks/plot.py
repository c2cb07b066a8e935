"""The README's plot: tokens a second of every arm of the committed SFT results.

The picture carries a digest of the figures that it shows; `python -m benchmarks.tables` draws it anew where they
differ.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sft"
PLOT = ROOT / "docs" / "images" / "sft-h100.png"
TITLES = {"lora-1b": "LoRA, 4 x 2048 tokens", "lora-1b-ragged": "LoRA, 16 ragged rows",
          "lora-1b-packed": "LoRA, ragged rows packed to 4 x 2048", "full-1b": "all weights, 4 x 2048 tokens",
          "qlora-8b": "QLoRA, Llama 8B shape, 2 x 2048 tokens", "lora-4b": "LoRA, Qwen3 4B shape, 4 x 2048 tokens",
          "lora-1b-16k": "LoRA, 1 x 16,384 tokens"}
OURS, OTHERS = "#08519c", "#9aa3ad"
_KEY = "Figures"


def figures() -> list[tuple[str, list[tuple[str, float]]]]:
    """(title, [(arm, tokens a second)]) of each workload that was measured, the quickest arm first."""
    found = []
    for name, title in TITLES.items():
        path = RESULTS / f"{name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        arms = [(row["arm"], float(row["tokens_per_s"])) for row in rows if "tokens_per_s" in row]
        if arms:
            found.append((title, sorted(arms, key=lambda arm: -arm[1])))
    return found


def digest() -> str:
    """Of the figures, rounded as they are shown."""
    shown = [[title, [[arm, f"{rate:,.0f}"] for arm, rate in arms]] for title, arms in figures()]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a picture carries; None where there is no picture, or none of ours."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return getattr(picture, "text", {}).get(_KEY)


def draw(path: Path) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = figures()
    heights = [len(arms) for _, arms in groups]
    figure = Figure(figsize=(8, 0.9 + 0.36 * sum(heights) + 0.42 * len(groups)), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=heights)
    most = max(rate for _, arms in groups for _, rate in arms)
    for axes, (title, arms) in zip(panels[:, 0], groups, strict=True):
        names, rates = [arm for arm, _ in arms], [rate for _, rate in arms]
        bars = axes.barh(names, rates, height=0.72, color=[OURS if name.startswith("fast") else OTHERS
                                                           for name in names])  # fmt: skip
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.12 * most)
        axes.set_title(title, loc="left", fontsize=10, pad=4)
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.tick_params(axis="x", length=0, labelbottom=False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle("SFT on one NVIDIA H100 (Llama 1B shape but where named): tokens a second", fontsize=12, x=0.02,
                    ha="left")
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={_KEY: digest(), "Software": None})
