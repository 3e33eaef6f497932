"""Draws running.png: how the share of a batch in the running mean follows a channel that drifts, then rests."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from normlab.colours import BLUE
from normlab.nn import RunningBatchNorm2d

BATCHES, DRIFTS_FROM, RESTS_FROM = 600, 240, 280
FIXED = 0.1


def batches() -> list[torch.Tensor]:
    """Batches of two images of 16 channels, whose means drift together for a while."""
    generator = torch.Generator().manual_seed(0)
    centre, found = 0.0, []
    for step in range(BATCHES):
        centre += 0.1 if DRIFTS_FROM <= step < RESTS_FROM else 0.0
        found.append(torch.randn(2, 16, 2, 2, generator=generator) + centre)
    return found


def main() -> None:
    norm, fixed = RunningBatchNorm2d(16), torch.nn.BatchNorm2d(16, momentum=FIXED)
    seen, running, ordinary, shares = [], [], [], []
    for x in batches():
        norm(x)
        fixed(x)
        seen.append(x[:, 0].mean().item())
        running.append(norm.running_mean[0].item())
        ordinary.append(fixed.running_mean[0].item())
        shares.append(norm.share.item())
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4.5), sharex=True, height_ratios=(2, 1))
    above.plot(seen, ".", color="0.7", markersize=4, label="mean of a batch of two images")
    above.plot(ordinary, color="0.4", label=f"fixed share {FIXED}")
    above.plot(running, color=BLUE, label="running")
    above.set_ylabel("mean of a channel")
    above.legend(frameon=False, loc="upper left")
    below.semilogy(shares, color=BLUE)
    below.set(xlabel="batch", ylabel="share w")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("running.png"), dpi=110)


if __name__ == "__main__":
    main()
