"""Names with settings, as people write them."""

from __future__ import annotations

import pytest

from sharpness_plugins.texts import name_and_settings


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("hessian_topk", ("hessian_topk", {})),
        ("hessian_topk:k=3", ("hessian_topk", {"k": 3})),
        ("epsilon_box:epsilon=5e-4, starts=(1, 2)", ("epsilon_box", {"epsilon": 5e-4, "starts": (1, 2)})),
        ("builtin:hessian_topk:k=3,which=LA", ("builtin:hessian_topk", {"k": 3, "which": "LA"})),
        ("builtin:hessian_topk", ("builtin:hessian_topk", {})),
        ("m:x=None,y=[1,{'a': 2}],z=a=b", ("m", {"x": None, "y": [1, {"a": 2}], "z": "a=b"})),
        ("m:x='a,b',y=don't,z=\"1]\"", ("m", {"x": "a,b", "y": "don't", "z": "1]"})),
        (r"m:x='it\'s, so',y='\\',z=3", ("m", {"x": "it's, so", "y": "\\", "z": 3})),
        ("m:x={[]: 1}", ("m", {"x": "{[]: 1}"})),
    ],
)
def test_a_name_and_its_settings_as_text(text, parsed):
    assert name_and_settings(text) == parsed


@pytest.mark.parametrize("text", ["m:x=1,fast", "m:x=1,2y=3"])
def test_a_setting_without_a_value_is_refused(text):
    with pytest.raises(ValueError, match="is not KEY=VALUE"):
        name_and_settings(text)
