"""`perseus doctor`: what is here, what is missing, what to do."""

from __future__ import annotations

import argparse

from perseus_core.commands.inputs import answers, print_json

HELP = "say what this machine has and lacks for Perseus; reads only"

_STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print the answer for machines")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each finding; exit code 1 if something is missing without which nothing can be saved."""
    from perseus_core.commands.examination import Verdict, examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not args.json:
            word = finding.verdict.value
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            line = f"[{_STYLES[word]}]{word:>8}[/]  {finding.subject}: {finding.fact}{remedy}"
            answers.print(line, highlight=False, soft_wrap=True)
    if args.json:
        print_json(
            {
                "findings": [
                    {"verdict": f.verdict.value, "subject": f.subject, "fact": f.fact, "remedy": f.remedy}
                    for f in findings
                ]
            }
        )
    return 1 if any(f.verdict is Verdict.MISSING for f in findings) else 0
