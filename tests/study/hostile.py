"""Stores that an attacker, a full disk or a text editor may leave: by name, the bytes of the file and what is said."""

import json
import os
import random
from pathlib import Path

from normlab.study.lines import LONGEST, seal
from normlab.study.plan import Trial

DEPTH = 100_000
TRIAL = Trial(images=100)
FIGURES = {"loss": 0.5, "accuracy": 0.75}
GOOD = {
    "key": TRIAL.key,
    "settings": TRIAL.to_dict(),
    "status": "finished",
    "diverged_at_step": None,
    "error": None,
    "steps": 2,
    "seconds": 1.5,
    "parameters": 62274,
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "machine": {"cpu": "Imaginary 9000", "threads": 1},
    "finished_at": "2026-03-01T10:11:12+00:00",
    "epochs": [{"epoch": 1, "train": FIGURES, "valid": FIGURES, "seconds": 0.5}],
    "curve": {"step": [1, 2], "loss": [0.75, 0.25]},
    "activations": {"step": [1], "mean": {"0": [0.5]}, "deviation": {"0": [1.0]}},
}


def line(**fields) -> bytes:
    """A line without checksum, as they were before, with these fields in place of good ones."""
    return json.dumps(GOOD | fields).encode() + b"\n"


def text(**fields: str) -> bytes:
    """The same with the JSON of the fields given as text, which json would not write."""
    values = {name: json.dumps(value) for name, value in GOOD.items()} | fields
    return ("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in values.items()) + "}\n").encode()


def setting(**values) -> bytes:
    return line(settings=GOOD["settings"] | values)


WHOLE = seal(GOOD)

# The file's content, and what the message says of line 2 (line 1 is good).
REFUSED: dict[str, tuple[bytes, str]] = {
    "a list": (b"[]\n", "no object"),
    "a number": (b"5\n", "no object"),
    "null": (b"null\n", "no object"),
    "a text": (b'"settings status key"\n', "no object"),
    "words": (b"these are my notes\n", "Expecting value"),
    "words without end": (b"these are my notes", "Expecting value"),
    "other JSON": (b'{"a": 1}\n', "no settings or status"),
    "other JSON without end": (b'{"a": 1}', "no settings or status"),
    "JSON over several lines": (json.dumps(GOOD, indent=1).encode(), "Expecting"),
    "two records in a line": (line()[:-1] + line(), "Extra data"),
    "deep lists": (b"[" * DEPTH + b"]" * DEPTH + b"\n", "nested too deep"),
    "deep lists without end": (b"[" * DEPTH, "nested too deep"),
    "deep objects": (b'{"a": ' * DEPTH + b"1" + b"}" * DEPTH + b"\n", "nested too deep"),
    "deep settings": (text(settings='{"norm": ' + "[" * DEPTH + "]" * DEPTH + "}"), "nested too deep"),
    "deep epochs": (text(epochs="[" * DEPTH + "]" * DEPTH), "nested too deep"),
    "a record in a field that is deep": (text(other="[" * DEPTH + "]" * DEPTH), "nested too deep"),
    "not UTF-8": (line(error="é").replace(b"\\u00e9", b"\xe9"), "utf-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "utf-8"),
    "a byte order mark": (b"\xef\xbb\xbf" + line(), "BOM"),
    "NUL bytes": (b"\0" * 4096 + b"\n", "Expecting value"),
    "NUL bytes without end": (b"\0" * 4096, "Expecting value"),
    "a NUL in a text": (line(error="a?b").replace(b"?", b"\0"), "Invalid control character"),
    "random bytes": (random.Random(0).randbytes(5000).replace(b"\n", b"") + b"\n", "utf-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "utf-8"),
    "duplicate keys": (text(key='"a", "key": "b"'), "'key' twice"),
    "a duplicate setting": (text(settings='{"norm": "batch", "norm": "running"}'), "'norm' twice"),
    "a duplicate metric": (text(epochs='[{"epoch": 1, "valid": {"accuracy": 1, "accuracy": 0}}]'), "'accuracy' twice"),
    "NaN": (text(seconds="NaN"), "NaN is no number"),
    "infinity": (text(curve='{"step": [1], "loss": [-Infinity]}'), "Infinity is no number"),
    "a number beyond all floats": (text(seconds="1e999"), "seconds is not a number"),
    "a metric whose square is beyond": (
        line(epochs=[{"epoch": 1, "valid": {"accuracy": 1.7e308}}]),
        "epochs is not",
    ),
    "a metric beyond all floats": (text(epochs='[{"epoch": 1, "valid": {"accuracy": 1e999}}]'), "epochs is not"),
    "a huge whole number": (text(steps="9" * 400), "more than 20 digits"),
    "a larger one than Python reads": (text(steps="9" * 10_000), "more than 20 digits"),
    "a huge seed": (text(settings='{"norm": "batch", "seed": ' + "9" * 400 + "}"), "more than 20 digits"),
    "a huge loss": (text(curve='{"step": [1], "loss": [' + "9" * 400 + "]}"), "more than 20 digits"),
    "no key": (json.dumps({name: GOOD[name] for name in GOOD if name != "key"}).encode() + b"\n", "no key"),
    "a key that is a number": (line(key=5), "key is not a text"),
    "a key that is a list": (line(key=["a"]), "key is not a text"),
    "settings that are a list": (line(settings=["norm"]), "settings is not an object"),
    "an unknown status": (line(status="excellent"), "status is not one of"),
    "a status that is a list": (line(status=["finished"]), "status is not one of"),
    "epochs that are a number": (line(epochs=3), "epochs is not"),
    "epochs of numbers": (line(epochs=[1, 2]), "epochs is not"),
    "a metric that is a word": (line(epochs=[{"epoch": 1, "valid": {"accuracy": "good"}}]), "epochs is not"),
    "a metric that is true": (line(epochs=[{"epoch": 1, "valid": {"accuracy": True}}]), "epochs is not"),
    "a metric that is a list": (line(epochs=[{"epoch": 1, "valid": {"accuracy": [1]}}]), "epochs is not"),
    "figures that are a list": (line(epochs=[{"epoch": 1, "valid": [1]}]), "epochs is not"),
    "an epoch that is a word": (line(epochs=[{"epoch": "one", "valid": FIGURES}]), "epochs is not"),
    "a curve that is a list": (line(curve=[1, 2]), "curve is not"),
    "a curve without steps": (line(curve={"loss": [1.0]}), "curve is not"),
    "a curve of words": (line(curve={"step": [1], "loss": ["low"]}), "curve is not"),
    "a curve with other steps than losses": (line(curve={"step": [1, 2], "loss": [1.0]}), "curve is not"),
    "a curve with words as steps": (line(curve={"step": ["1"], "loss": [1.0]}), "curve is not"),
    "a step that is a word": (line(status="diverged", diverged_at_step="late"), "diverged_at_step is not"),
    "a step below zero": (line(status="diverged", diverged_at_step=-1), "diverged_at_step is not"),
    "an error that is an object": (line(status="failed", error={"a": 1}), "error is not a text"),
    "seconds that are a word": (line(seconds="long"), "seconds is not a number"),
    "parameters that are a part": (line(parameters=0.5), "parameters is not a whole number"),
    "versions that are a list": (line(versions=["torch"]), "versions is not"),
    "a version that is a number": (line(versions={"torch": 2.13}), "versions is not"),
    "a machine that is a word": (line(machine="fast"), "machine is not"),
    "a time that is a number": (line(finished_at=5), "finished_at is not"),
    "activations that are words": (line(activations={"step": [1], "mean": {"0": ["low"]}}), "activations are not"),
    "activations without steps": (line(activations={"mean": {"0": [1.0]}}), "activations are not"),
    "too many activations": (line(activations={"step": [1], "mean": {"0": [1.0, 2.0]}}), "activations are not"),
    "a norm that is a list": (setting(norm=["batch"]), "norm="),
    "an optimizer that is a list": (setting(optimizer=["sgd"]), "optimizer="),
    "a schedule that is an object": (setting(schedule={}), "schedule="),
    "a batch size that is a word": (setting(batch_size="two"), "batch_size="),
    "a batch size of zero": (setting(batch_size=0), "batch_size="),
    "a rate that is null": (setting(lr=None), "lr="),
    "a seed below zero": (setting(seed=-1), "seed="),
    "metrics that are numbers": (setting(metrics=[1]), "metrics="),
    "metrics that are none": (setting(metrics=[]), "metrics="),
    "a direction that is a word": (setting(lower="no"), "lower="),
    "a newer version": (json.dumps({"format": 99} | GOOD).encode() + b"\n", "newer version.*Update normlab"),
    "a newer version with its checksum": (
        seal(GOOD).replace(b'{"format": 2', b'{"format": 99'),
        "newer version.*Update normlab",
    ),
    "a checksum of another line": (WHOLE[:-12] + seal(GOOD | {"steps": 3})[-12:], "checksum is another"),
    "a line without its checksum": (WHOLE.partition(b', "checksum"')[0] + b"}\n", "checksum is another"),
    "something behind a checksum": (WHOLE[:-1] + b" {}\n", "Extra data|checksum is another"),
    "a good checksum of nonsense": (seal({"key": 1, "settings": 2, "status": 3}), "key is not a text"),
    "a start without a process": (seal({"key": "a", "host": "b", "started": "now"}), "a start needs"),
    "a start of wrong kinds": (seal({"key": 1, "host": 2, "process": 3, "started": 4}), "a start needs"),
    "a line of 100 MB": (b'{"key": "' + b"a" * 100_000_000 + b'"}\n', f"longer than {LONGEST:,} bytes"),
    "a line of 100 MB without end": (b"{" + b" " * 100_000_000, f"longer than {LONGEST:,} bytes"),
}

# What can be read, and must be shown without harm.
READ: dict[str, bytes] = {
    "script in a norm": setting(norm="<script>alert(1)</script>"),
    "script in a model": setting(model="</script><img src=x onerror=alert(1)>"),
    "script in an error": line(status="failed", error="</pre><script>alert(1)</script>", epochs=[]),
    "markup in a norm": setting(norm="[/red][link=x]norm[/]"),
    "a terminal's commands in a norm": setting(norm="\x1b[2Jnorm\x07"),
    "half a character in an error": line(status="failed", error="\ud800 failed", epochs=[]),
    "other scripts in a norm": setting(norm="批归一化 \u202e\U0001f600"),
    "a norm without a name": setting(norm=""),
    "a norm of 10,000 letters": setting(norm="n" * 10_000),
    "unknown fields": line(future={"a": [1, "two", None]}),
    "unknown settings": setting(future="setting"),
    "no epochs": line(epochs=[], curve={"step": [], "loss": []}),
    "null figures": line(epochs=[{"epoch": 1, "train": None, "valid": {"accuracy": None}}]),
    "the largest numbers": line(epochs=[{"epoch": 1, "train": {}, "valid": {"accuracy": 9e149, "loss": -9e149}}]),
    "ends of Windows": line().replace(b"\n", b"\r\n"),
    "empty lines": b"\n\n" + line() + b"\n",
    "no end": line()[:-1],
    "a torn end": line() + WHOLE[:100],
}


def make_folder(path: Path) -> None:
    path.mkdir()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


THINGS = {"a folder": make_folder, "a pipe": make_pipe, "a link to itself": make_loop}
