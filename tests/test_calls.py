"""Names with arguments as text."""

import pytest

from ringsim.calls import Call, parse_call
from ringsim.errors import WorkloadError


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("ring", Call("ring")),
        ("ring()", Call("ring")),
        (" double-ring( 8 , stride = 2 ) ", Call("double-ring", ("8",), {"stride": "2"})),
        ("runs(0:100, 1:50)", Call("runs", ("0:100", "1:50"))),
    ],
)
def test_a_call_is_a_name_with_arguments(text, call):
    assert parse_call(text, "strategy") == call


@pytest.mark.parametrize("text", ["", "8", "Ring", "ring(", "ring)(", "ring(1,,2)", "ring(a=1,2)", "ring(a=1,a=2)", "ring(x(1))"])
def test_what_is_no_call_is_refused_with_its_text(text):
    with pytest.raises(WorkloadError, match="strategy"):
        parse_call(text, "strategy")
