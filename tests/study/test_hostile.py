"""Hostile stores: each is refused in a clear line or shown without harm, and none is changed by reading."""

import io
import json
import random
import re
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from normlab.errors import InputError
from normlab.study.lines import seal
from normlab.study.record import Record
from normlab.study.store import RunStore
from normlab.study.summary import summarize
from normlab.study.table import terminal_table
from study.hostile import GOOD, READ, REFUSED, THINGS, line

HANGS = timedelta(minutes=1)
ADVICE = "Move the file away|Update normlab|nothing is yet"


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_store_is_refused_and_not_changed(tmp_path, name):
    content, words = REFUSED[name]
    path = tmp_path / "runs.jsonl"
    path.write_bytes(line() + content)
    for read in (RunStore(path).read, RunStore(path).heads):
        with pytest.raises(InputError, match=rf"runs.jsonl, line 2,.*({words})") as caught:
            read()
        assert re.search(ADVICE, str(caught.value))
        assert len(str(caught.value)) < 500
    if not content.endswith(b"\n"):
        with pytest.raises(InputError, match="last line"):
            RunStore(path).append(Record("a", {}, "finished"))
    assert path.read_bytes() == line() + content


@pytest.mark.parametrize("name", READ)
def test_what_can_be_read_can_be_shown(tmp_path, name):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(READ[name])
    records = RunStore(path).read()
    assert len(records) == 1
    assert "\x1b" not in shown(records)
    RunStore(path).append(Record("a", {}, "finished"))
    assert len(RunStore(path).read()) == 2


@pytest.mark.parametrize("name", THINGS)
@pytest.mark.parametrize("use", ["read", "append"])
def test_what_is_no_file_is_refused(tmp_path, name, use):
    path = tmp_path / "runs.jsonl"
    THINGS[name](path)
    with pytest.raises(InputError, match=r"runs\.jsonl"):
        RunStore(path).read() if use == "read" else RunStore(path).append(Record("a", {}, "finished"))


def shown(records) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(terminal_table(records))
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    text.encode()
    return text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def altered(draw):
    """A good line with one value, anywhere in it, replaced by another or taken out."""
    values = json.loads(json.dumps(GOOD))
    at, names = values, list(values)
    while True:
        name = draw(st.sampled_from(names))
        inner = at[name]
        if not inner or not isinstance(inner, dict | list) or draw(st.booleans()):
            break
        at = inner
        names = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
    if draw(st.integers(0, 4)):
        at[name] = draw(JSON)
    else:
        del at[name]
    return values


@settings(max_examples=400, deadline=HANGS)
@given(altered())
def test_one_wrong_value_is_refused_or_can_be_shown(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "altered.jsonl"
    for content in (json.dumps(values).encode() + b"\n", seal(values)):
        path.write_bytes(content)
        try:
            records = RunStore(path).read()
        except InputError as error:
            assert re.search(ADVICE, str(error))  # noqa: PT017
        else:
            summarize(records * 2)
            shown(records)
            assert [record.losses for record in records]


@settings(max_examples=400, deadline=HANGS)
@given(st.binary(max_size=60), st.integers(0, 3), st.randoms(use_true_random=False))
def test_bytes_put_into_a_store_are_seen(tmp_path_factory, added, taken, chance: random.Random):
    """Bytes are put in, or taken out, anywhere but at the end: the file is refused, or every line is as it was."""
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    whole = seal(GOOD) + seal(GOOD | {"key": "b"})
    at = chance.randrange(len(whole) - 4)
    path.write_bytes(whole[:at] + added + whole[at + taken :])
    try:
        records = RunStore(path).read()
    except InputError as error:
        assert re.search(ADVICE, str(error))  # noqa: PT017
    else:
        assert all(record in (Record.from_json(GOOD), Record.from_json(GOOD | {"key": "b"})) for record in records)
