"""charon's IKE_SAs, by the names and in the form that the agent's commands use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence

from ikectx.engine.hints import advice
from ikectx.errors import IkectxError, UnknownSaError, UsageError
from ikectx.sa.name import SaName
from vici_bridge.away.passing import RELAY_PORTS
from vici_bridge.host import CharonHost
from vici_bridge.known import Known
from vici_bridge.vici.views import SaView


async def select(known: Known, request: Mapping[str, str], gateways: Collection[str]) -> list[SaView]:
    """The SAs that the request names: see `chosen`. All SAs are listed only if all are meant, or if none that
    is known is. Errors: as there, CharonError, WireError."""
    with contextlib.suppress(UnknownSaError):
        if request.get("all") != "yes":
            found = chosen((await known.now()).views, request, gateways)
            await known.again(view.spis for view in found)
            return chosen(known.present.views, request, gateways)
    return chosen(await known.list_all(), request, gateways)


def chosen(
    views: Sequence[SaView], request: Mapping[str, str], gateways: Collection[str] = ()
) -> list[SaView]:
    """The SAs that ike, ike-id, spi, peer or all name in the request.

    gateways: addresses of other gateways whose connections to this one run through an SA here: such an SA is
    selected only by its name. Errors: UnknownSaError, UsageError.
    """
    views = [view for view in views if view.state not in ("CONNECTING", "DELETING")]
    wanted = {key: request[key] for key in ("ike", "ike-id", "spi", "peer") if request.get(key)}
    if len(wanted) > 1 or (wanted and request.get("all") == "yes"):
        raise UsageError("name SAs in one way only: ike, ike-id, spi, peer or all")
    tests: dict[str, Callable[[SaView, str], bool]] = {
        "ike": lambda view, name: view.name == name,
        "ike-id": lambda view, number: str(view.unique_id) == number,
        "spi": lambda view, spi: any(part.hex().startswith(spi) for part in (*view.spis, *_child_spis(view))),
        "peer": lambda view, peer: peer in (view.remote_id, view.remote_eap_id, str(view.remote.address)),
    }
    for key, given in wanted.items():
        value = given.lower().removeprefix("0x") if key == "spi" else given
        views = [view for view in views if tests[key](view, value)]
    if "spi" in wanted and len(views) > 1:
        raise UnknownSaError(
            f"{len(views)} IKE_SAs have an SPI that begins with {wanted['spi']}",
            hint="give more of its digits",
        )
    if not wanted:
        views = [view for view in views if not _of_gateway(view, gateways)]
    if not views and request.get("all") == "yes":
        return []  # an empty gateway is drained
    if not views:
        what = " ".join(f"{key} {value}" for key, value in wanted.items()) or "any name"
        raise UnknownSaError(f"no IKE_SA answers to {what}", hint="`ikectx list` shows those there are")
    if not wanted and request.get("all") != "yes" and len(views) > 1:
        raise UnknownSaError(
            f"there are {len(views)} IKE_SAs: say which",
            hint="use --ike, --ike-id, --spi, --peer or --all",
        )
    return list(views)


def _of_gateway(view: SaView, gateways: Collection[str]) -> bool:
    """Whether a gateway's connection runs through it; at another port a mobile node is, which it relays."""
    return str(view.remote.address) in gateways and view.remote.port not in RELAY_PORTS


def sa_name(text: str) -> SaName | None:
    """An SA's name as `list` prints it: both SPIs in hexadecimal with a colon between. Errors: UsageError."""
    if not text:
        return None
    try:
        return SaName.from_text(text.lower())
    except ValueError:
        raise UsageError(
            f"sa is not an IKE_SA's two SPIs: {text!r}", hint="as `ikectx list` prints them: SPIi:SPIr"
        ) from None


def _child_spis(view: SaView) -> list[bytes]:
    return [spi for child in view.children for spi in (child.spi_in, child.spi_out)]


def view_json(
    view: SaView, obstacle: IkectxError | None, way: str = "move", why: str = ""
) -> dict[str, object]:
    """A view as plain data. `obstacle`: why the agent cannot move the SA, whatever its state.

    `way`: how its mobile node would get to another gateway, and `why` not by being told its address.
    """
    reason, hint = ("", "") if obstacle is None else (str(obstacle), obstacle.hint or advice(obstacle.status))
    if not reason and view.state != "ESTABLISHED":
        reason, hint = f"it is {view.state}", "only an ESTABLISHED IKE_SA is moved"
    return {
        "name": view.name,
        "ike_id": view.unique_id,
        "state": view.state,
        "spi_i": view.spi_i.hex(),
        "spi_r": view.spi_r.hex(),
        "role": "initiator" if view.initiator else "responder",
        "local": str(view.local),
        "remote": str(view.remote),
        "local_id": view.local_id,
        "remote_id": view.remote_id,
        "remote_eap_id": view.remote_eap_id,
        "vips": [str(vip) for vip in view.remote_vips],
        "rekey_in": view.rekey,
        "reauth_in": view.reauth,
        "established": view.established,
        "tasks": list(view.tasks),
        "movable": not reason,
        "way": "" if reason else way,
        "why": "" if reason else why,
        "known": not isinstance(obstacle, UnknownSaError),
        "reason": reason,
        "hint": hint,
        "children": [
            {
                "name": child.name,
                "state": child.state,
                "spi_in": child.spi_in.hex(),
                "spi_out": child.spi_out.hex(),
                "local_ts": list(child.local_ts),
                "remote_ts": list(child.remote_ts),
                "rekey_in": child.rekey,
                "life": child.life,
            }
            for child in view.children
        ],
    }


def charon_json(host: CharonHost) -> dict[str, object]:
    """Whether charon answers, its version, and whether it receives from the HA socket."""
    return {
        "reachable": host.charon_up,
        "version": host.ha_version.charon,
        "ha": host.listening(),
        "ha_version": host.ha_version.number,
        "problem": host.ha_version.problem,
    }
