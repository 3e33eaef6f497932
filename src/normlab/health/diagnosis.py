"""What is wrong with a model's norms, in plain words, ranked, each with its remedy."""

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import check
from ..files import write_whole
from ..surgery.effect import Batches, Forward, first_input
from .candidates import Candidate, best, candidates, gain, listed
from .faults import FAR, FAULTS, RECALIBRATE, Fault
from .layer import Layer
from .measure import Loss, Output, Target, measure, second_part

NAMED = 4  # norms in a verdict
CONTRAST = 0.1  # of the variance, between images; of images that are normalised it is 0.003 to 0.06
COLUMNS = {  # of the table, as many as 80 characters hold: the figure's name, its heading, its format
    "values": ("values", "d"),
    "noise": ("noise", ".2f"),
    "offset": ("offset", ".2f"),
    "gap": ("gap", ".2f"),
    "constant": ("constant", ".0%"),
    "closed": ("closed", ".0%"),
    "turn": ("turn", ".1g"),
}


@dataclass(frozen=True)
class Finding:
    """A fault of one or more norms.

    Attributes:
        fault: in a few words.
        modules: the norms that have it, the worst first.
        effect: how bad the worst of them is, 0 to ∞: about the deviations that its output is off, or the share of its
            channels.
        verdict: what it does.
        remedy: what helps.
        command: Python that does so, or the first step.
    """

    fault: str
    modules: list[str]
    effect: float
    verdict: str
    remedy: str
    command: str


@dataclass(frozen=True)
class Diagnosis:
    """Printed as a table of the norms and the verdicts.

    Attributes:
        findings: the faults, by effect.
        layers: every norm's figures, in the order of the model.
        output: what becomes of the model's output.
        notes: what is no fault, but good to know.
    """

    findings: list[Finding]
    layers: list[Layer]
    output: Output
    notes: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite becomes a string."""
        return _plain({"healthy": self.healthy, **asdict(self)})

    def save(self, path: str | Path) -> None:
        """Write it as JSON (`.json`) or as a picture (`.png`), whole or not at all.

        Raises:
            InputError: another ending, or the file cannot be written.
        """
        path = Path(path)
        check(path.suffix in (".json", ".png"), "path", str(path), "a name that ends in .json or .png")
        if path.suffix == ".png":
            from ..observe.plots import save
            from .picture import draw

            save(draw(self.layers, self.lines()), path)
            return
        write_whole(path, json.dumps(self.to_dict(), indent=1).encode())

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown = {name: column for name, column in COLUMNS.items() if any(_known(layer, name) for layer in self.layers)}
        table = Table(box=None, pad_edge=False)
        for heading in ("norm", "class"):
            table.add_column(heading, overflow="fold")  # cut off, many names would read alike
        for heading, _ in shown.values():
            table.add_column(heading, justify="right")
        for layer in self.layers:
            cells = (format(getattr(layer, n), f) if _known(layer, n) else "" for n, (_, f) in shown.items())
            table.add_row(*map(Text, (layer.name or "(the model)", layer.kind, *cells)))
        return Group(table, Text(), *map(Text, self.lines()))

    def lines(self) -> list[str]:
        """What was looked at, how training and evaluation differ, and the verdicts."""
        output = self.output
        parts = [f"{len(self.layers)} norms, {output.batches} batches, {output.images} images."]
        if output.gap is not None:
            parts.append(f"Output in training {output.gap:.2g} deviations from that in evaluation.")
        if output.training_loss is not None:
            parts.append(f"Loss {output.training_loss:.3g} in training, {output.evaluation_loss:.3g} in evaluation.")
        lines = [" ".join(parts), *self._not_measured()]
        lines += self.notes
        if self.healthy:
            lines.append("Nothing found." if self.layers else "No norms.")
        for number, finding in enumerate(self.findings, 1):
            lines += ["", f"{number}. {finding.fault} ({_count(finding.modules)}; effect {finding.effect:.2g})"]
            lines += [f"   {finding.verdict}", f"   → {finding.remedy}", f"     {finding.command}"]
        return lines

    def _not_measured(self) -> list[str]:
        """Why figures are missing: each reason, with its norms."""
        of: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.unmeasured is not None:
                of.setdefault(layer.unmeasured, []).append(layer.name)
        return [f"Not all measured, {_count(names)}: {reason}." for reason, names in of.items()]

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue().rstrip()


def diagnose(
    model: nn.Module,
    batches: Batches,
    *,
    forward: Forward = first_input,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    target: Target = second_part,
    limit: int = 32,
) -> Diagnosis:
    """Look for what is wrong with a model's norms, at the size of the batches given.

    Every batch goes through the model twice. The first pass is in evaluation mode. In the second, norms that train are
    in training mode: all of them if the whole model is in evaluation mode. Afterwards the model, its statistics and
    torch's generators are as before.

    Args:
        model: of any modules.
        batches: of the size that it trains with, of images as it trains on.
        forward: runs the model on one of `batches`; by default on the batch, or on the first of its parts.
        loss: of the model's output and the targets of a batch.
        optimizer: of this model. With `loss` it tells how fast the weights before norms turn.
        target: gives the targets of a batch. By default they are its second part, or in a dict what stands under
            `label` or a like key.
        limit: take no more batches than this.

    Raises:
        InputError: there are no batches, the model does not take one of them, or it has no targets for `loss`.

    Source: van Laarhoven 2017, "L2 regularization versus batch and weight normalization", for the turning of weights;
    the remarks in `faults.py` for the rest.
    """
    check(limit >= 1, "limit", limit, "a whole number from 1")
    layers, output, kept = measure(model, batches, forward, loss, optimizer, target, limit)
    findings = [finding for fault in FAULTS if (finding := _finding(fault, layers)) is not None]
    differs = [layer for layer in layers if (layer.contrast or 0.0) > CONTRAST]
    tried = candidates(model, kept, forward, loss, target) if differs and loss is not None else []
    if (better := best(tried)) is not None:
        findings = [*map(partial(_instead, better=better), findings), _contrast(differs, tried, better)]
    findings.sort(key=lambda finding: -finding.effect)
    if not findings and (output.gap or 0.0) > FAR and any(layer.gap or layer.unmeasured for layer in layers):
        findings.append(_unexplained(layers, output.gap or 0.0))
    if forward is not first_input:
        findings = [replace(finding, command=_with_forward(finding.command)) for finding in findings]
    return Diagnosis(findings, layers, output, notes(layers, output, bool(differs) and loss is None))


def _finding(fault: Fault, layers: list[Layer]) -> Finding | None:
    effects = [(effect, layer) for layer in layers if (effect := fault.effect(layer))]
    if not effects:
        return None
    effects.sort(key=lambda pair: -pair[0])
    effect, worst = effects[0]
    first = next(layer for layer in layers if fault.effect(layer))
    named = {"name": worst.name or "the model", "first": first.name or "the model", "noise": worst.noise or 0.0}
    verdict = fault.verdict.format(**{**vars(worst), **named})
    command = fault.command.replace("{name}", worst.name.split(", ")[0])
    return Finding(fault.name, [layer.name for _, layer in effects], effect, verdict, fault.remedy, command)


def _contrast(differs: list[Layer], tried: list[Candidate], better: Candidate) -> Finding:
    (first,) = differs
    return Finding(
        "images differ in contrast",
        [first.name],
        gain(tried[0], better),
        f"At {first.name} {first.contrast:.0%} of the variance is between images: they differ in brightness or "
        f"contrast, and the statistics of all fit none of them. Loss in evaluation: {listed(tried)}.",
        f"The best of these is: {better.name}. Then train on for some epochs. For a training from the start there is "
        "running_instance too.",
        better.command,
    )


def _instead(finding: Finding, better: Candidate) -> Finding:
    """The same finding, with a remedy that was measured to be better than new statistics."""
    if RECALIBRATE not in finding.command or better.command == RECALIBRATE:
        return finding
    remedy = f"On these batches new statistics help less than this does: {better.name}."
    return replace(finding, remedy=remedy, command=better.command)


def _with_forward(command: str) -> str:
    """With the way to run the model, where batches are given."""
    return re.sub(r"\bbatches(?=[,)])", "batches, forward=forward", command)


def notes(layers: list[Layer], output: Output, contrast: bool) -> list[str]:
    """What is no fault, but good to know.

    Args:
        layers: the norms.
        output: of the model.
        contrast: images differ, and there is no loss to say what helps.
    """
    found = []
    if output.batches == 1 and any(layer.values is not None for layer in layers):
        found.append("Noise is not measured: one batch does not show how far batches are from each other.")
    if contrast:
        worst = max(layers, key=lambda layer: layer.contrast or 0.0)
        found.append(
            f"Images differ in brightness or contrast: at {worst.name} {worst.contrast:.0%} of the variance is between "
            "them. Give loss=, and what helps is measured: new statistics, group or instance norm."
        )
    if passed := [layer.name for layer in layers if layer.passed_by]:
        found.append(
            f"{_count(passed)}: no torch _BatchNorm. torch.optim.swa_utils.update_bn, and the freezing of Lightning "
            "and timm, pass such norms by; normlab.recalibrate, normlab.freeze and normlab.is_norm know them."
        )
    return found


def _unexplained(layers: list[Layer], gap: float) -> Finding:
    unmeasured = [layer.name for layer in layers if layer.unmeasured]
    return Finding(
        "training and evaluation differ",
        [layer.name for layer in layers if layer.gap] or unmeasured,
        gap,
        f"The model's output in evaluation is {gap:.2g} deviations from that in training, though no norm alone is far "
        "off: small differences add up.",
        "Measure the statistics anew, or use a norm that does not depend on the batch.",
        RECALIBRATE,
    )


def _count(names: list[str]) -> str:
    shown = ", ".join(name or "the model" for name in names[:NAMED])
    rest = len(names) - NAMED
    return f"{len(names)} norm{'s' * (len(names) > 1)}: {shown}" + (f" and {rest} more" if rest > 0 else "")


def _known(layer: Layer, name: str) -> bool:
    return getattr(layer, name) is not None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
