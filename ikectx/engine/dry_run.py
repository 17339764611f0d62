"""The dry run of a transfer asks whether the peer would take the SA. It changes and journals nothing."""

from __future__ import annotations

from dataclasses import replace as changed

from ikectx.errors import IkectxError, LinkError, RefusedError, StateError
from ikectx.numbers import Status
from ikectx.wire.cxtp import size

from .hints import advice
from .lines import reply_to
from .offer_answer import offer_status, refusal_text
from .old_gateway import Outgoing
from .procedures import Steps
from .report import TransferReport

_WORDS = {"mn": "invitation", "update": "move"}
"""Words for the ways that have others than in the protocol."""


class DryRun(Outgoing):
    """A transfer that is only offered for a check."""

    def ask_only(self) -> Steps[TransferReport]:
        """Ask the peer whether it would take the exported context."""
        yield from self.export()
        timing = self.parts.timing
        try:
            if self.context is None:
                raise self.error or StateError("nothing was exported")
            with self.parts.scheduler.using(self.peer.name):
                link = yield from self._connect()
                offer = self.offer("check")
                began = self.parts.now
                octets, asked = link.ask(offer)
                self.count(octets)
                answer = yield from reply_to(asked, began + timing.offer)
                spent = (self.parts.now - began) * 1000
            if answer is None:
                raise LinkError(f"{self.peer.name} did not answer in time", hint="see its log")
            if isinstance(answer, LinkError):
                raise answer
        except IkectxError as error:
            self.blame(error)
            return changed(self.report(), dry_run=True)
        self.count(size(answer))
        status, self._verdicts = offer_status(answer)
        report = changed(
            self.report(),
            dry_run=True,
            status=status,
            state_there=f"{self.peer.name} knows nothing of it",
            phases_ms={**self.phases(), "check": round(spent, 3)},
        )
        if status is Status.OK:
            how = f", by {_WORDS.get(report.address, report.address)}: {report.why}" if report.why else ""
            return changed(report, text=f"{self.peer.name} would take it{how}")
        text = f"{self.peer.name} would refuse: {refusal_text(status, self._verdicts)}"
        code = RefusedError.exit_code
        return changed(report, result="refused", text=text, hint=advice(status), exit_code=code)
