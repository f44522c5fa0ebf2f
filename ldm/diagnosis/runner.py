"""Runs the checks in causal order and derives the verdict."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from ldm.devices import usual_torch_state
from ldm.diagnosis.check import Check, Clock, Figure, Finding, Measured, Topic, checks_in_order
from ldm.diagnosis.opened_run import OpenedRun
from ldm.errors import LdmError, first_line


@dataclass
class Outcome:
    """Result of one check.

    Attributes:
        check: the check.
        findings, measured, figures: results that it yielded.
        seconds: how long it took.
        skipped: why it did not run, or failed; empty if it ran.
    """

    check: Check
    findings: list[Finding] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    seconds: float = 0.0
    skipped: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Outcomes of all checks, in causal order."""

    outcomes: list[Outcome]

    @property
    def cause(self) -> Finding | None:
        """The first certain finding in causal order; None if there is none."""
        found = (finding for outcome in self.outcomes for finding in outcome.findings if finding.certain)
        return next(found, None)

    @property
    def notes(self) -> list[Finding]:
        """All other findings."""
        return [each for outcome in self.outcomes for each in outcome.findings if each is not self.cause]

    @property
    def verdict(self) -> str:
        """One sentence: the cause with its evidence and the config key to change, or that none was found."""
        cause, ran = self.cause, sum(not outcome.skipped for outcome in self.outcomes)
        if cause is not None:
            return f"{cause.problem[0].upper()}{cause.problem[1:]}: {cause.evidence}; {cause.remedy} ({cause.key})."
        failed = [outcome.check.title for outcome in self.outcomes if outcome.skipped]
        missing = f"; not checked: {', '.join(failed)}" if failed else ""
        return f"No fault was found in {ran} checks{missing}."


@usual_torch_state()
def diagnose(
    run: OpenedRun,
    seconds: float = 150.0,
    everything: bool = False,
    progress: Callable[[str], object] = lambda title: None,
) -> Diagnosis:
    """Run all checks that apply to the stages of a run, within a time.

    Args:
        run: the run.
        seconds: time for all checks; each gets its share of what is left.
        everything: go on after a topic in which a cause was found, although later measurements depend on it.
        progress: called with the title of each check before it begins.
    """
    checks = checks_in_order()
    outcomes, end, found = [], time.monotonic() + seconds, None
    for number, each in enumerate(checks):
        outcome = Outcome(each)
        outcomes.append(outcome)
        if found is not None and each.topic > found and not everything:
            outcome.skipped = "they depend on what was found"
            continue
        if each.stages and not run.stages.keys() & set(each.stages):
            outcome.skipped = f"there are no weights of stage {' or '.join(each.stages)}"
            continue
        if time.monotonic() > end:
            outcome.skipped = "the time was up"
            continue
        progress(each.title)
        share = each.weight / sum(other.weight for other in checks[number:])
        _examine(run, outcome, Clock(share * max(0.0, end - time.monotonic())))
        if any(finding.certain for finding in outcome.findings):
            found = found or each.topic
    return Diagnosis(outcomes)


def _examine(run: OpenedRun, outcome: Outcome, clock: Clock) -> None:
    """Run one check; one that cannot be made is reported and does not end the diagnosis."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for item in outcome.check.run(run, clock):
                if isinstance(item, Finding):
                    outcome.findings.append(item)
                elif isinstance(item, Measured):
                    outcome.measured.append(item.text)
                else:
                    outcome.figures.append(item)
    except LdmError as error:
        outcome.skipped = first_line(error)
    except Exception as error:  # a broken run may fail in any way, and the other checks may find why
        outcome.skipped = f"{type(error).__name__}: {first_line(error)}"
    outcome.seconds = time.monotonic() - start


def topic_name(topic: Topic) -> str:
    """Return the name of a topic as text."""
    return topic.name.lower().replace("_", " ")
