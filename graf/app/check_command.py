"""`graf check`: what training finds on this machine, a line each, and whether it could start here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from graf.app.failures import ErrorLog, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the machine; returns the exit code, 1 where training could not start."""
    parser = argparse.ArgumentParser(
        prog="graf check", description="Look at this machine: what training finds on it, and what is missing."
    )
    parser.add_argument(
        "--config", default="default", help="YAML file, or name of a shipped configuration (default: %(default)s)"
    )
    parser.add_argument("--device", help="auto | cpu | cuda | cuda:1 | mps (default: the configuration's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="any key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    device = [] if options.device is None else [f"training.device={options.device}"]

    def command(errors: ErrorLog) -> int:
        from graf.app.machine_check import Machine, Verdict, check_machine, describe_findings

        findings = check_machine(Machine(options.config, (*device, *options.overrides)))
        can_train = all(finding.verdict is not Verdict.PROBLEM for finding in findings)
        if options.json:
            print(json.dumps({"can_train": can_train, "findings": [asdict(finding) for finding in findings]}, indent=1))
        else:
            print("\n".join(describe_findings(findings)))
        return 0 if can_train else 1

    return run_command(command, debug=options.debug, interrupted="interrupted")
