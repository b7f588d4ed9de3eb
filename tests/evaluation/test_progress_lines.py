import time

import pytest

from windowlm.evaluation.progress_lines import SECONDS_BETWEEN, ProgressLines


@pytest.mark.parametrize("shown", [True, False])
def test_a_line_is_said_from_time_to_time(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = ProgressLines("scoring", shown=shown)
    for done in range(101):
        now[0] = done * SECONDS_BETWEEN / 25
        lines.update(done, 100)
    screen = capsys.readouterr()
    assert screen.out == ""
    said = screen.err.splitlines()
    assert said == (
        ["scoring  25%     10 s", "scoring  50%     20 s", "scoring  75%     30 s", "scoring 100%     40 s"]
        if shown
        else []
    )
