"""What a model's layers do: hooks, activation statistics, plots; it watches any model in any loop."""

from .activations import ActivationStats, blocks
from .hooks import Hook, Hooks
from .plots import plot_activations, plot_histograms, plot_losses, plot_near_zero, plot_training

__all__ = [
    "ActivationStats",
    "Hook",
    "Hooks",
    "blocks",
    "plot_activations",
    "plot_histograms",
    "plot_losses",
    "plot_near_zero",
    "plot_training",
]
