"""Why a trial failed, out of the text that Tune keeps."""

from __future__ import annotations

import pytest

from rayfed_lora.tuning.watching import reason_in

CALL = 'ray::Trial.train() (pid=1, ip=127.0.0.1)\n  File "trial.py", line 9, in step\n    run()\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{CALL}rayfed_lora.errors.RunError: it is full\n", "it is full"),
        (
            f"{CALL}rayfed_lora.errors.RecipeError: r.yaml: 1 fault\n  seed: expected 1\n",
            "r.yaml: 1 fault\n  seed: expected 1",
        ),
        (f"{CALL}ValueError: no such thing\n", "ValueError: no such thing"),
        (
            f"{CALL}KeyError: 'a'\n\nThe above exception was the direct cause of the following"
            f" exception:\n\n{CALL}some.module.OddError: both\n",
            "OddError: both",
        ),
        (
            f"{CALL}rayfed_lora.errors.ClientError: client 3 failed in round 2:\nTraceback:\n"
            "ValueError: inner\n",
            "client 3 failed in round 2:\nTraceback:\nValueError: inner",
        ),
        ("The actor died unexpectedly.\n", "The actor died unexpectedly."),
        ("", ""),
    ],
)
def test_the_newest_error_is_found_in_a_text_of_failures(text, reason):
    heading = "Failure # 2 (occurred at 2026-01-01_00-00-00)\n"
    assert reason_in(heading + text) == reason
    assert reason_in(f"Failure # 1 (occurred at x)\n{CALL}OSError: old\n{heading}{text}") == reason
