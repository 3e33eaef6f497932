"""The colours of all charts, in one place: told apart by the colour-blind, on white and on black."""

BLUE, VERMILION, GREEN, PINK, RED, SKY, VIOLET, GREY = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C80046", "#2F9BDB", "#8844DD", "#8A8A8A",
)  # fmt: skip

# Norms that always have the same colour, by their registered names; the others take what is left.
COLOURS = {
    "running": BLUE,
    "batch": VERMILION,
    "group": GREEN,
    "layer": PINK,
    "instance": RED,
    "rms": SKY,
    "renorm": VIOLET,
    "none": GREY,
}
