"""What several fuzz tests share: JSON values, and JSON with something in it replaced, dropped or added."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

QUICK = settings(max_examples=80, deadline=None, derandomize=True, report_multiple_bugs=False)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([10**400, -(2**63), 2**64]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["", "\ud800", "\x1b]0;title\x07", "exact", "failed", "1ep", "nan", "samples", "0"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a tree of JSON."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, entry in entries for place in places(entry, (*path, key))]


@st.composite
def mutated(draw: Any, original: Any) -> Any:
    """The tree with one to three places changed."""
    tree = {"root": copy.deepcopy(original)}
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(places(tree)[1:]))
        holder: Any = tree
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "drop", "add", "borrow"]))
        if action == "drop" and way:
            del holder[last]
        elif action == "add" and isinstance(holder[last], dict):
            holder[last][draw(st.text(max_size=5))] = draw(VALUES)
        elif action == "add" and isinstance(holder[last], list):
            holder[last].append(draw(VALUES))
        elif action == "borrow":
            other: Any = original
            for key in draw(st.sampled_from(places(original))):
                other = other[key]
            holder[last] = copy.deepcopy(other)
        else:
            holder[last] = draw(VALUES)
    return tree["root"]
