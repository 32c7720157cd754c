"""Which backend was chosen for a source, and why each other was not."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Verdict:
    """What was decided about one backend: `outcome` is `chosen`, `accepted` or `refused`, `reason` a sentence."""

    backend: str
    outcome: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """The decision, best backend first. `ladder` names what "auto" goes through: the chosen one, then what it falls
    back to when the kernel refuses that at run time. A named backend has a ladder of one.
    """

    source: str
    ladder: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def backend(self) -> str:
        """The chosen backend's name."""
        return self.ladder[0]

    def explain(self) -> str:
        """One line per backend: chosen, accepted but not best, or refused, and why."""
        width = max(len(verdict.backend) for verdict in self.verdicts)
        return "\n".join(f"{v.backend:<{width}}  {v.outcome:<8}  {v.reason}" for v in self.verdicts)

    def demoted(self, reason: str) -> Choice:
        """The choice after the kernel refused the chosen backend at run time."""
        refused, following = self.ladder[:2]

        def now(verdict: Verdict) -> Verdict:
            if verdict.backend == refused:
                return replace(verdict, outcome="refused", reason=reason)
            if verdict.backend == following:
                return replace(verdict, outcome="chosen", reason=f"took over from {refused}")
            return verdict

        return replace(self, ladder=self.ladder[1:], verdicts=tuple(map(now, self.verdicts)))
