"""A pytest plugin: the outcome of each test on disk as soon as it is known, so that a killed run loses none.

    BENCH_TEST_RESULTS=FILE python -m pytest -p bench.lib.test_results ...

A line of JSON for each test: nodeid, outcome, seconds, and the end of its report where it failed.
"""

import json
import os
from pathlib import Path


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # xdist's workers report to the one process that writes
        config.pluginmanager.register(_Writer(Path(os.environ["BENCH_TEST_RESULTS"])))


class _Writer:
    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            entry = {"nodeid": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            self.write(entry | ({"report": report.longreprtext[-4000:]} if report.failed else {}))

    def pytest_collectreport(self, report):
        if report.failed:
            self.write({"nodeid": report.nodeid, "outcome": "not collected", "report": report.longreprtext[-4000:]})

    def write(self, entry):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
