"""The table of the situations and their tests are one: README.md here is what the tests say.

`python tests/situations/test_table.py` writes it anew.
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
HEAD = """# Situations

What people met with norms and surgery on them, in public reports, each as a small test with plain torch. Its docstring
is the need. What is right is calculated apart from this package, mostly in float64 or with torch's own layers.

- **held**: was right before issue 17.
- **mended**: was wrong before it, and is right now.
- **left and said**: is left as it is, with a row or an error that says why.

The kind is that of issue 17. The link is to the report that the situation is taken from; its code was not copied.

"""
COLUMNS = "| situation | kind | need | verbs | outcome |\n| --- | --- | --- | --- | --- |\n"


def situations() -> list[tuple[str, str, object]]:
    """File, test and situation, in the order of the files."""
    sys.path.insert(0, str(HERE.parent))
    found = []
    for path in sorted(HERE.glob("test_*.py")):
        if path == Path(__file__):
            continue
        spec = importlib.util.spec_from_file_location(f"situations_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        for name, test in vars(module).items():
            if name.startswith("test_"):
                found.append((path.name, name, getattr(test, "situation", None)))
    return found


def table() -> str:
    """What README.md has to say."""
    lines = [
        f"| [{one.link}]({one.url}) | {one.kind} | [{one.need}]({file}) | {one.verbs} | {one.outcome} |"
        for file, _, one in situations()
    ]
    return HEAD + COLUMNS + "\n".join(lines) + "\n"


def test_every_test_is_a_situation_with_a_link_and_a_need():
    found = situations()
    assert [name for _, name, one in found if one is None] == []
    assert all(one.need for _, _, one in found)
    assert len({one.link for _, _, one in found}) >= 40


def test_the_links_are_other_than_those_of_the_complaints():
    complaints = (HERE.parent / "test_complaints.py").read_text()
    assert [one.link for _, _, one in situations() if f'"{one.link}"' in complaints] == []


def test_every_kind_and_every_verb_has_a_situation():
    kinds = {one.kind for _, _, one in situations()}
    assert kinds == {"0", "0b", *"ABCDEFGHJKOQRS"}
    verbs = {verb for _, _, one in situations() for verb in one.verbs.split(", ")}
    assert {"convert", "freeze", "unfreeze", "fold", "recalibrate", "sync", "unsync", "diagnose", "is_norm"} <= verbs


def test_the_readme_is_the_table_of_the_tests():
    assert (HERE / "README.md").read_text() == table()


if __name__ == "__main__":
    (HERE / "README.md").write_text(table())
