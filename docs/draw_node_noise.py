"""Draws docs/node-noise.png, the picture of docs/node-noise.md: ``python docs/draw_node_noise.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

CELL = 0.5


def grid(ax: Axes, data: np.ndarray, left: float, top: float, colors: str) -> None:
    """A matrix as colored cells, its upper left corner at (left, top)."""
    m, n = data.shape
    box = (left, left + n * CELL, top - m * CELL, top)
    ax.imshow(data, cmap=colors, vmin=-2.5, vmax=2.5, extent=box, aspect="auto", zorder=1)
    ax.hlines(top - CELL * np.arange(m + 1), box[0], box[1], color="0.6", lw=0.4, zorder=2)
    ax.vlines(left + CELL * np.arange(n + 1), box[2], box[3], color="0.6", lw=0.4, zorder=2)


def say(ax: Axes, x: float, y: float, text: str, size: float = 11, color: str = "black") -> None:
    """A centred text."""
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=color)


def main() -> None:
    rng = np.random.default_rng(3)
    x, w, e = rng.normal(size=(6, 1)), rng.normal(size=(6, 9)), rng.normal(size=(1, 9))
    ratios = {"width_ratios": [4.6, 3.2, 3.6]}
    fig, (first, second, third) = plt.subplots(1, 3, figsize=(11, 3.6), gridspec_kw=ratios)

    first.set_title("1. Two members of a pair, one row t", fontsize=11)
    grid(first, x.T, 0, 4, "Greys")
    say(first, 1.5, 4.35, "$x_t$")
    say(first, 3.45, 3.75, r"$\times$")
    grid(first, w, 4, 4.9, "Greys")
    say(first, 6.25, 5.25, "W, the same for all")
    grid(first, (x.T @ w) / 2, 4, 1.2, "Greys")
    say(first, 3.1, 0.95, "$y_t =$")
    grid(first, e, 4, 0.25, "PuOr")
    say(first, 3.1, 0.0, r"$\pm\,\sigma e_t$")
    say(first, 4.2, -0.85, "fresh noise on what comes out, for every row", 9, "0.3")
    first.set(xlim=(-0.4, 9.0), ylim=(-1.2, 5.6))

    second.set_title("2. What the row is given", fontsize=11)
    colors = ["0.8", "0.8", "tab:orange", "tab:orange", "0.8", "0.8"]
    second.bar(range(6), [0.1, -0.2, 0.9, 0.5, -0.3, 0.15], color=colors, width=0.6)
    second.axhline(0, color="0.5", lw=0.7)
    second.set_xticks([])
    second.set_yticks([])
    say(second, 2, -0.1, "t")
    say(second, 3, -0.1, "t+1")
    say(
        second,
        2.5,
        1.28,
        r"$c_t = \sum_{s\geq t}\ \gamma^{s-t}\ \frac{l^+_s - l^-_s}{2\sigma}$",
        12,
    )
    say(second, 2.5, -0.62, "differences of the pair's scores, row by row", 9, "0.3")
    second.set_ylim(-0.75, 1.6)
    second.spines[:].set_visible(False)

    third.set_title("3. The gradient: one outer product a row", fontsize=11)
    grid(third, x, 0, 4, "Greys")
    say(third, 0.25, 4.35, "$x_t$")
    say(third, 0.95, 2.5, r"$\times$")
    grid(third, e, 1.4, 4.9, "PuOr")
    say(third, 3.65, 5.25, r"$c_t\, e_t$")
    grid(third, np.outer(x, e), 1.4, 4, "RdBu")
    say(third, 3.2, 0.45, r"$\hat G = \mathrm{mean}_{t,\,pairs}\ x_t\, (c_t e_t)^\top$", 12)
    say(third, 3.2, -0.35, "summed over all rows and pairs\nby one matrix product", 9, "0.3")
    third.set(xlim=(-0.3, 6.3), ylim=(-0.9, 5.6))

    for ax in (first, third):
        ax.axis("off")
    fig.tight_layout()
    fig.savefig(Path(__file__).with_name("node-noise.png"), dpi=110)


if __name__ == "__main__":
    main()
