"""What holds of every verb of surgery on every model, each law checked by a calculation of its own.

`obey(seed)` grows a tree, draws a verb and its arguments, and raises AssertionError where a law is broken.
"""

import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normlab import convert, diagnose, fold, freeze, recalibrate, sync, unfreeze, unsync
from normlab.errors import InputError
from normlab.nn import build_norm

from .trees import OURS, InType, Tree, everything, grow

TARGETS = [*OURS, "torch", *["running", "batch", "frozen", "group", "instance"] * 4]
CLASSES = {type(build_norm(name, 4, dims)) for name in OURS for dims in (1, 2, 3)}
HOOKS = [key for key in nn.Module().__dict__ if "hook" in key]
FEWEST = 32  # values a channel, of which `recalibrate` takes statistics
SAME = "the same in evaluation"


# --- looking at a model -----------------------------------------------------------------------------------------------


def numbers() -> list[Any]:
    """The state of every generator of random numbers."""
    name, keys, *rest = np.random.get_state()
    return [torch.get_rng_state().numpy().tobytes(), (name, keys.tobytes(), *rest), random.getstate()]


def parts_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in {**module._parameters, **module._buffers}.items() if v is not None}


class Photo:
    """All there is of a model: which modules are where, their tensors bit by bit, modes, gradients, hooks, numbers."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.modules = everything(model)
        self.tensors = {path: parts_of(module) for path, module in self.modules.items()}
        self.values = {
            path: {name: part.detach().clone() for name, part in parts.items()} for path, parts in self.tensors.items()
        }
        self.looks = {path: looks(module) for path, module in self.modules.items()}
        self.numbers = numbers()

    def check_same(self, what: str, objects: bool = True) -> None:
        """Fails where the model is another now; with `objects` the very same modules and tensors are there."""
        self.check_like(self.model, what, objects)
        assert numbers() == self.numbers, f"{what}: random numbers"

    def check_like(self, model: nn.Module, what: str, objects: bool = False) -> None:
        """Fails where a model is not as this one was."""
        now = Photo(model)
        assert list(now.modules) == list(self.modules), f"{what}: modules at other places"
        for path, module in self.modules.items():
            assert_looks(now.looks[path], self.looks[path], f"{what}: {path}")
            assert now.values[path].keys() == self.values[path].keys(), f"{what}: {path}"
            for name, value in self.values[path].items():
                assert torch.equal(now.values[path][name], value), f"{what}: {path}.{name}"
            if objects:
                assert now.modules[path] is module, f"{what}: {path} is another module"
                for name, part in self.tensors[path].items():
                    assert now.tensors[path][name] is part, f"{what}: {path}.{name} is another tensor"


def looks(module: nn.Module) -> dict[str, Any]:
    """Class, mode, gradient switches and hooks."""
    held = {key: getattr(module, key) for key in HOOKS}
    found: dict[str, Any] = {
        key: list(map(hook, held[key].values())) for key in HOOKS if isinstance(held[key], Mapping)
    }
    found |= {"class": type(module), "training": module.training}
    found["learns"] = {name: part.requires_grad for name, part in module._parameters.items() if part is not None}
    return found


def hook(called: Any) -> Any:
    """A function is itself in a copy, too; an object is copied."""
    return called if inspect.isroutine(called) else type(called)


def assert_looks(found: dict[str, Any], expected: dict[str, Any], where: Any) -> None:
    other = {key: (expected[key], found[key]) for key in expected if found[key] != expected[key]}
    assert not other, f"{where}: {other}"


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Inside, the model may run; after, it is as it was."""
    modules = list(everything(model).values())
    modes = [module.training for module in modules]
    values = [(part, part.detach().clone()) for module in modules for part in parts_of(module).values()]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        with torch.no_grad():
            for part, value in values:
                if not torch.equal(part, value):
                    part.copy_(value)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def leaves_with_gradients(output: Any) -> list[Tensor]:
    """Every tensor of an output, as it is."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = list(vars(output).values())
    elif hasattr(output, "__slots__") and not isinstance(output, tuple):
        output = [output.values]
    return [leaf for part in output or () for leaf in leaves_with_gradients(part)]


def leaves(output: Any) -> list[Tensor]:
    """Their values."""
    return [leaf.detach().double().clone() for leaf in leaves_with_gradients(output)]


def evaluate(model: nn.Module, images: list[Tensor]) -> list[Tensor]:
    """The outputs in evaluation; a model that draws random numbers draws the same every time."""
    with kept(model), torch.no_grad():
        model.eval()
        return [leaf for x in images for leaf in leaves(model(x.clone()))]


def far(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference over the largest value, or over 0.01: what is 0 but for rounding has no size."""
    assert len(before) == len(after)
    largest = max(*(float(part.abs().max()) for part in before), 0.01)
    return max(float((a - b).abs().max()) / largest for b, a in zip(before, after, strict=True))


def root_mean_square(before: list[Tensor], after: list[Tensor]) -> float:
    """Of the change, over the deviation of what was."""
    one, other = (torch.cat([part.flatten() for part in parts]) for parts in (before, after))
    change, deviation = float((other - one).square().mean().sqrt()), float(one.std(correction=0))
    return change / deviation if deviation > 0 else (np.inf if change > 0 else 0.0)


def known_norms(model: nn.Module) -> list[list[str]]:
    """What normalises, by what it is: of each all paths to it."""
    found: dict[int, list[str]] = {}
    for path, module in everything(model).items():
        ours = type(module) in CLASSES
        statistics = {"running_mean", "running_var"} <= set(module._buffers)
        if ours or statistics or isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm)):
            found.setdefault(id(module), []).append(path)
    return list(found.values())


def tolerance(tree: Tree) -> float:
    """Of rounding, which a few layers may magnify."""
    inside = [module.dtype for module in everything(tree.model).values() if isinstance(module, InType)]
    return 1e-7 if tree.wide else (0.3 if torch.bfloat16 in inside else 1e-3)


# --- the laws ---------------------------------------------------------------------------------------------------------


class Case:
    """A tree, a verb and its arguments."""

    def __init__(self, seed: int, verb: str | None = None):
        self.rng = random.Random(f"case {seed}")
        self.seed, self.tree = seed, grow(seed)
        self.verb = verb or self.rng.choice(WEIGHTED)
        self.model, self.images, self.tolerance = self.tree.model, self.tree.images(), tolerance(self.tree)
        self.photo = Photo(self.model)
        self.norms = known_norms(self.model)
        self.inplace = self.rng.random() < 0.5
        self.before = evaluate(self.model, self.images)
        self.said: dict[str, Any] = {}  # the arguments

    def twin(self) -> nn.Module:
        """The model as it was, once more."""
        with kept(self.model):
            return grow(self.seed).model

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def choice(self) -> dict[str, Any]:
        """Perhaps some of the norms only."""
        seen = set(dict(self.photo.model.named_modules(remove_duplicate=False)))
        names = [path.removeprefix("model.") for paths in self.norms for path in paths]
        names = [name for name in names if name in seen]
        return {self.rng.choice(["only", "skip"]): self.rng.choice(names)} if names and self.chance(0.25) else {}

    def run(self, operate: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What a verb returns, after laws that hold of all; None where it refused, and left all as it was."""
        self.said = options
        refusal, result = None, None
        try:
            result = operate(self.model, *args, **options)
        except InputError as error:
            refusal = str(error)
        if refusal is not None:
            self.photo.check_same(f"after a refusal ({refusal})")
            assert self.is_meant(refusal), f"refused: {refusal}"
            return None
        assert numbers() == self.photo.numbers, "random numbers"
        if not options.get("inplace", True):
            self.photo.check_same("the original of a copy")
        return result

    def is_meant(self, error: str) -> bool:
        """Whether these arguments are to be refused."""
        return "cannot be copied" in error and not self.tree.copies and not self.said.get("inplace", True)

    def row_of(self, operation: Any, paths: list[str]) -> Any:
        """The one row of a norm."""
        rows = [row for row in operation.report if set(map(path_of, row.name.split(", "))) & set(paths)]
        assert len(rows) == 1, f"{len(rows)} rows for {paths}"
        return rows[0]

    def check_report(self, operation: Any) -> dict[str, Any]:
        """Every norm has its row, each row says what is there now, and the rest is as it was; the rows by path."""
        now, rows, touched = everything(operation.model), {}, []
        for paths in self.norms:
            row = rows[paths[0]] = self.row_of(operation, paths)
            self.check_row(row, paths, now)
            touched += paths if row.became is not None else []
        for path, was in self.photo.looks.items():
            if not any(path == one or path.startswith((one + ".", one + "[")) for one in touched):
                assert_looks(looks(now[path]), was, path)
        return rows

    def check_row(self, row: Any, paths: list[str], now: dict[str, nn.Module]) -> None:
        was = self.photo.looks[paths[0]]
        assert row.note, row
        assert row.was.split()[-1] == was["class"].__name__, row
        assert len({id(now[path]) for path in paths}) == 1, f"{row}: others at {paths}"
        new = now[paths[0]]
        if row.became is None:
            assert_looks(looks(new), was if self.verb != "fold" else was | {"training": new.training}, row)
            return
        assert row.became.split()[-1] == type(new).__name__, row
        assert new is not self.photo.modules[paths[0]], row
        if self.verb != "fold":
            assert_looks(looks(new), {key: was[key] for key in was if key in HOOKS or key == "training"}, row)

    def check_undo(self, operation: Any) -> None:
        """All is as before, bit by bit."""
        model = operation.undo()
        assert model is operation.model
        assert not self.said.get("inplace", True) or model is self.model
        self.photo.check_like(model, "undo", objects=model is self.model)
        for one, other in zip(evaluate(model, self.images), self.before, strict=True):
            assert torch.equal(one, other), "the output after undo"
        if model is not self.model:
            self.photo.check_same("the original after undo")

    def check_output(self, operation: Any, rows: dict[str, Any]) -> None:
        """The same, where all rows say so."""
        notes = [row.note for row in rows.values() if row.became is not None]
        if all(note.startswith(SAME) and "assumed" not in note for note in notes):
            change = far(self.before, evaluate(operation.model, self.images))
            same = change <= self.tolerance or change <= 10 * self.rounding()
            assert same, f"the output is another by {change}, and the rows say {notes}"

    def runs(self, operation: Any) -> bool:
        """Whether nothing was assumed of how norms are called."""
        return not any("assumed to be given its input by position" in row.note for row in operation.report)

    def rounding(self, images: list[Tensor] | None = None) -> float:
        """How far the output goes for rounding in every module, which a norm of nearly equal values magnifies."""
        images = images or self.images
        twin, before = self.twin(), evaluate(self.twin(), images)
        for module in everything(twin).values():
            if not list(module.children()) and not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_hook(lambda _, __, y: rounded(y, 8))
        return far(before, evaluate(twin, [rounded(x, 80) for x in images]))

    def check_trains(self, model: nn.Module) -> None:
        """It trains, where the model as it was does."""
        twin = self.twin()
        with kept(model):
            try:
                step(twin, self.images[0])
            except (RuntimeError, ValueError, TypeError):
                return
            step(model, self.images[0])


def rounded(x: Any, times: float) -> Any:
    """A tensor off by so many roundings of its largest value, at most, here more and there less."""
    if type(x) is not Tensor or not x.is_floating_point() or x.numel() == 0:
        return x
    off = torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view_as(x) * x.abs().max().double()
    return (x.double() + times * torch.finfo(x.dtype).eps * off).to(x.dtype)


def step(model: nn.Module, x: Tensor) -> None:
    """A pass forward and back, in training mode; leaves no gradients."""
    output = leaves_with_gradients(model.train()(x.clone()))
    if any(part.requires_grad for part in output):
        sum(part.sum() for part in output if part.requires_grad).backward()
    for module in everything(model).values():
        module.zero_grad()


def path_of(name: str) -> str:
    return f"model.{name}" if name else "model"


# --- the verbs --------------------------------------------------------------------------------------------------------


def obey_convert(case: Case) -> None:
    to = case.rng.choice(TARGETS)
    options: dict[str, Any] = {"inplace": case.inplace, **case.choice()}
    if case.chance(0.5):
        options |= {"batches": case.tree.batches, "fit": case.chance(0.4)}
    optimizer = None
    parameters = list(case.model.parameters())
    if case.inplace and parameters and case.chance(0.5):
        half = len(parameters) // 2
        groups = [{"params": part} for part in (parameters[:half], parameters[half:]) if part]
        options["optimizer"] = optimizer = torch.optim.SGD(groups, lr=0.1)
    operation = case.run(convert, to, **options)
    if operation is None:
        return
    rows = case.check_report(operation)
    runs = case.runs(operation)
    if options.get("fit"):
        assert_finite(operation)
    elif runs:
        case.check_output(operation, rows)
    if "batches" in options:
        check_changes(case, operation, rows)
    if optimizer is not None:
        check_optimizer(optimizer, operation.model)
    if runs and case.chance(0.3):
        case.check_trains(operation.model)
    case.check_undo(operation)
    if optimizer is not None:
        assert [id(p) for g in optimizer.param_groups for p in g["params"]] == list(map(id, parameters))


def assert_finite(operation: Any) -> None:
    assert all(part.isfinite().all() for part in operation.model.parameters())


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """It has the model's parameters, each once."""
    there = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(there) == len(set(there)), "a parameter twice in the optimizer"
    assert set(there) == {id(parameter) for parameter in model.parameters()}, "the optimizer's parameters"


def check_changes(case: Case, operation: Any, rows: dict[str, Any]) -> None:
    """The changes of the report are those that one finds by running old and new."""
    after = evaluate(operation.model, case.images)
    expected = root_mean_square(case.before, after)
    assert is_close(operation.report.change, expected, case), f"change {operation.report.change}, not {expected}"
    old, new = case.twin(), everything(operation.model)
    modules = everything(old)
    seen = captured(old, [path for path, row in rows.items() if row.became is not None], case.images)
    for path, calls in seen.items():
        row = rows[path]
        if not calls:
            assert row.change is None, row
            continue
        with kept(new[path]), torch.no_grad():
            ys = [new[path].eval().forward(*args, **kwargs) for args, kwargs, _ in calls]  # without hooks
        before = [y.double() for *_, y in calls]
        expected = root_mean_square(before, [y.double() for y in ys])
        if row.change is None:
            assert_even(row, before, expected)
            continue
        assert is_close(row.change, expected, case), f"{row}: not {expected}"
        if row.note.startswith(SAME) and not case.said["fit"] and row.change > case.tolerance:
            with kept(old := modules[path]), torch.no_grad():
                off = [
                    old.eval().forward(rounded(args[0], 8), *args[1:], **kwargs)
                    for args, kwargs, _ in list(calls)
                    if args
                ]
            magnified = root_mean_square(before, [y.double() for y in off]) if off else 0.0
            assert row.change <= 10 * magnified, row


def assert_even(row: Any, before: list[Tensor], expected: float) -> None:
    """Where a change is not known what there was hardly varied, and the row says so."""
    deviation = float(torch.cat([part.flatten() for part in before]).std(correction=0))
    assert "its output hardly varies" in row.note, row
    assert expected > 0, row
    assert deviation < 0.1, (row, deviation)


def is_close(found: float | None, expected: float, case: Case) -> bool:
    if found is None:
        return False
    if not np.isfinite(expected):
        return not np.isfinite(found) or found > 1e3
    return abs(found - expected) <= 10 * case.tolerance * (1 + expected)


def captured(model: nn.Module, paths: list[str], images: list[Tensor]) -> dict[str, list[Any]]:
    """What the norms at these paths are given, and put out before hooks, in evaluation."""
    modules, seen = everything(model), {path: [] for path in paths}
    for path in paths:
        modules[path].forward = recording(modules[path].forward, seen[path])
    evaluate(model, images)
    return seen


def recording(forward: Callable[..., Tensor], calls: list[Any]) -> Callable[..., Tensor]:
    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        given = [a.clone() if isinstance(a, Tensor) else a for a in args]
        named = {k: a.clone() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        y = forward(*args, **kwargs)
        calls.append((given, named, y.clone()))
        return y

    return recorded


def obey_freeze(case: Case) -> None:
    affine = case.chance(0.7)
    operation = case.run(freeze, inplace=case.inplace, affine=affine, **case.choice())
    if operation is None:
        return
    rows = case.check_report(operation)
    case.check_output(operation, rows)
    now = everything(operation.model)
    frozen = [now[path] for path, row in rows.items() if row.became is not None]
    assert not affine or not any(part.requires_grad for norm in frozen for part in norm.parameters())
    if not any("Frozen" in look["class"].__name__ for look in case.photo.looks.values()):
        back = unfreeze(operation.model, inplace=True)
        case.photo.check_like(back.model, "frozen and unfrozen", objects=case.inplace)
        back.undo()
    case.check_undo(operation)


def obey_unfreeze(case: Case) -> None:
    operation = case.run(unfreeze, inplace=case.inplace)
    if operation is None:
        return
    if case.runs(operation):
        change = far(case.before, evaluate(operation.model, case.images))
        assert change <= case.tolerance, f"unfrozen, the output is another by {change}"
    case.check_undo(operation)


def obey_sync(case: Case) -> None:
    operation = case.run(sync, inplace=case.inplace, **case.choice())
    if operation is None:
        return
    case.check_output(operation, case.check_report(operation))
    if case.runs(operation) and all(row.note.startswith(SAME) for row in operation.report.touched):
        back = unsync(operation.model)
        change = far(case.before, evaluate(back.model, case.images))
        same = change <= case.tolerance or change <= 10 * case.rounding()
        assert same, f"to sync and back, the output is another by {change}"
    case.check_undo(operation)


def obey_unsync(case: Case) -> None:
    operation = case.run(unsync, inplace=case.inplace)
    if operation is not None:
        case.check_output(operation, {row.name: row for row in operation.report})
        case.check_undo(operation)


def obey_fold(case: Case) -> None:
    images = case.images[:1]
    operation = case.run(fold, *images, inplace=case.inplace)
    if operation is None:
        return
    rows, now = {paths[0]: case.row_of(operation, paths) for paths in case.norms}, everything(operation.model)
    for paths in case.norms:
        case.check_row(rows[paths[0]], paths, now)
    before, after = evaluate(case.twin(), images), evaluate(operation.model, images)
    change = far(before, after)
    same = change <= case.tolerance or change <= 10 * case.rounding(images)
    assert same, f"folded, the output is another by {change}"
    assert operation.report.change is None or is_close(operation.report.change, change, case)
    case.check_undo(operation)


def obey_recalibrate(case: Case) -> None:
    batches = case.tree.batches
    operation = case.run(recalibrate, batches, **case.choice())
    if operation is None:
        return
    now = everything(case.model)
    for paths in case.norms:
        case.row_of(operation, paths)
    for path, was in case.photo.looks.items():
        assert_looks(looks(now[path]), was, path)
        for name, value in case.photo.values[path].items():
            if name not in ("running_mean", "running_var", "num_batches_tracked"):
                assert torch.equal(parts_of(now[path])[name], value), f"{path}.{name}"
    if len(batches) == 1:
        check_statistics(case, operation)
    case.check_undo(operation)


def check_statistics(case: Case, operation: Any) -> None:
    """Of one batch: those of what each norm is given."""
    model = case.model
    names = [paths[0] for paths in case.norms if case.row_of(operation, paths).became is not None]
    seen, again = (capture_inputs(model, names, case.images, seed) for seed in (0, 1))
    now = everything(model)
    if any(not torch.equal(x, y) for path in seen for (x,), (y,) in zip(seen[path], again[path], strict=True)):
        return  # what draws random numbers draws others
    images = any(isinstance(now[path], nn.modules.instancenorm._InstanceNorm) for path in seen)  # it counts images
    few = any((len(x) if images else x.numel() // x.shape[1]) < FEWEST for calls in seen.values() for (x,) in calls)
    if few or any(len(calls) != 1 for calls in seen.values()):
        return
    for path, ((x,),) in ((path, calls) for path, calls in seen.items()):
        if isinstance(now[path], nn.modules.instancenorm._InstanceNorm) or "MovingAverage" in type(now[path]).__name__:
            continue
        values = x.double().transpose(0, 1).flatten(1)
        found = now[path].running_mean.double(), now[path].running_var.double()
        for one, other in zip(found, (values.mean(1), values.var(1)), strict=True):
            error = float((one - other).abs().max())
            assert error <= 10 * case.tolerance * (1 + float(other.abs().max())), f"{path}: statistics off by {error}"


def capture_inputs(model: nn.Module, paths: list[str], images: list[Tensor], seed: int = 0) -> dict[str, list[Any]]:
    modules, seen, handles = everything(model), {path: [] for path in paths}, []

    def record(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs: seen[path].append(([*args, *kwargs.values()][0].clone(),))

    for path in paths:
        handles.append(modules[path].register_forward_pre_hook(record(path), with_kwargs=True))
    with kept(model):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        evaluate(model, images)
    for handle in handles:
        handle.remove()
    return seen


def obey_diagnose(case: Case) -> None:
    diagnosis = case.run(diagnose, case.tree.batches)
    if diagnosis is not None:
        case.photo.check_same("after diagnose")


VERBS: dict[str, Callable[[Case], None]] = {
    "convert": obey_convert, "freeze": obey_freeze, "unfreeze": obey_unfreeze, "sync": obey_sync,
    "unsync": obey_unsync, "fold": obey_fold, "recalibrate": obey_recalibrate, "diagnose": obey_diagnose,
}  # fmt: skip
WEIGHTED = [*VERBS, "convert", "convert", "convert", "fold"]


def obey(seed: int, verb: str | None = None) -> None:
    """AssertionError, or whatever a verb raises, where a law is broken for this seed."""
    case = Case(seed, verb)
    VERBS[case.verb](case)
