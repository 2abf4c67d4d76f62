"""The table of `make test-faults`."""

import torch
from _pytest.terminal import TerminalReporter

from benchmarks.results import table, write_section
from tests.service.house import CHECKPOINT_EVERY, FAULTS, STEPS
from tests.waiting import LEASE_SECONDS


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    """Prints what each fault cost; where all were tried and survived, into benchmarks/RESULTS.md, too."""
    passed = terminalreporter.getreports("passed")
    for rows in [value for report in passed for name, value in report.user_properties if name == "soak"]:
        shown = table(["what", "how many"], rows)
        terminalreporter.write_line(shown)
        body = "30 training jobs of 400 steps, one every 20 s; two workers; a fault every 2 to 8 s for ten minutes.\n\n"
        write_section("Soak", "make soak", body + shown, torch.device("cpu"))
    found = [value for report in passed for name, value in report.user_properties if name == "fault"]
    if not found:
        return
    rows = [[name, f"{seconds:.1f}", *map(str, counts)] for name, seconds, *counts in found]
    head = ["fault", "seconds to recovery", "told steps retrained", "duplicates", "steps lost", "attempts"]
    shown = table(head, rows)
    terminalreporter.write_line(shown)
    if {row[0] for row in rows} == FAULTS.keys():
        body = (
            f"A training job of {STEPS} steps with a checkpoint every {CHECKPOINT_EVERY}, its lease {LEASE_SECONDS} s. "
            "Recovery: from the fault to the first step of the next attempt, or to the next stored checkpoint where "
            "the attempt survived. All end with an undisturbed run's weights, bit for bit.\n\n"
        )
        write_section("Faults", "make test-faults", body + shown, torch.device("cpu"))
