"""Whether a mobile node that authenticates again finds the gateway that it knows. Pure.

An SA keeps the gateway's identity when it moves. With `reauth_time` the mobile node sets up a new IKE_SA with
the gateway that serves it then, and ends the tunnel if that authenticates as somebody else.
"""

from __future__ import annotations

from collections.abc import Collection

from ikectx.wire.identity import ANY
from vici_bridge.vici.views import SaView

from .allowed import AllowedConnection

ONE_ID = "give all gateways one identity (`local { id = ... }`), with a certificate that has it"


def reauthentication(view: SaView, connection: AllowedConnection | None, others: Collection[str]) -> str:
    """What happens when the mobile node of that SA authenticates again, here or after a move; empty: nothing.

    `others`: identities of other gateways (`local_ids`).
    """
    if connection is None:
        return ""
    own = connection.local[-1].id if connection.local else ""
    if own not in (*ANY, view.local_id):
        return (
            f"connection {connection.name}: {view.remote_id} knows its gateway as {view.local_id}, and it is "
            f"{own} here: if it authenticates again (reauth_time) it ends its tunnel; {ONE_ID}"
        )
    other = sorted(set(others) - {own})
    if other:
        return (
            f"connection {connection.name}: other gateways are called {', '.join(other)}: a mobile node that "
            f"authenticates again (reauth_time) after a move ends its tunnel; {ONE_ID}"
        )
    return ""
