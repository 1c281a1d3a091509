"""Progress of long work, as a log shows it."""

import io

from rich.console import Console

from attnmem_local.builder import progress


def test_a_log_shows_a_line_now_and_then(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    log = io.StringIO()
    shown = progress.Progress()
    shown.console = Console(file=log)
    with shown.stage("self-study", 4000) as step:
        for _ in range(1000):  # 4 tokens in 0.1 s
            now += 0.1
            step(4)
    with shown.stage("write"):
        now += 1
    lines = log.getvalue().splitlines()
    assert lines[0] == "self-study" and lines[-1] == "write"
    assert 8 <= len(lines) - 2 <= 10 and lines[1] == "self-study: 10%, 90 s left"
    assert round(shown.seconds["self-study"]) == 100 and round(shown.seconds["write"]) == 1
