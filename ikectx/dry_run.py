"""The dry run of a transfer asks whether the peer would take the SA. It changes and journals nothing."""

from __future__ import annotations

import asyncio
from dataclasses import replace as changed

from .cxtp import Pctd
from .errors import IkectxError, LinkError, RefusedError, StateError
from .numbers import Status
from .outgoing import Outgoing, offer_status, refusal_text
from .profile import TransferHeader, encode
from .report import HINTS, TransferReport


class DryRun(Outgoing):
    """A transfer that is only offered for a check."""

    async def ask_only(self) -> TransferReport:
        """Ask the peer whether it would take the exported context."""
        context = self.context
        try:
            if context is None:
                raise self.error or StateError("nothing was exported")
            with self._links.in_use(self.peer):
                link = await self._connect()
                header = TransferHeader(self.transfer_id, "check", self.address)
                offer = Pctd(context.remote.address, encode(context, transfer=header))
                began = self.parts.clock.now()
                octets, asked = await link.ask(offer)
                self._count(octets)
                async with asyncio.timeout(self.parts.timing.offer):
                    answer = await asyncio.shield(asked)
                spent = (self.parts.clock.now() - began) * 1000
            if isinstance(answer, LinkError):
                raise answer
        except TimeoutError:
            self.blame(LinkError(f"{self.peer.name} did not answer in time", hint="see its log"))
            return changed(self.report(), dry_run=True)
        except IkectxError as error:
            self.blame(error)
            return changed(self.report(), dry_run=True)
        self._count(len(answer.serialize()))
        status, self._verdicts = offer_status(answer)
        report = changed(
            self.report(),
            dry_run=True,
            status=status,
            state_there=f"{self.peer.name} knows nothing of it",
            phases_ms={**self.phases(), "check": round(spent, 3)},
        )
        if status is Status.OK:
            return changed(report, text=f"{self.peer.name} would take it")
        text = f"{self.peer.name} would refuse: {refusal_text(status, self._verdicts)}"
        code = RefusedError.exit_code
        return changed(report, result="refused", text=text, hint=HINTS.get(status, ""), exit_code=code)
