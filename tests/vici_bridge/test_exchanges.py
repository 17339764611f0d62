"""What is said to an MN whose SPIs are taken, in which order, and under which message IDs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.engine.ports import MoveReport
from ikectx.errors import RefusedError
from ikectx.sa.context import Address, IkeContext, Secret
from ikectx.sa.keys import iv_length
from ikectx.wire.full_ctd import final_of
from ikectx.wire.ikev2 import HEADER_LENGTH
from mobike_ext.address_update import AddressUpdate, PeerNatChanged
from mobike_ext.link import RekeyReport, SpiReport, UpdateReport
from mobike_ext.naming import Renaming
from mobike_ext.notify import Reason
from mobike_ext.rekey import ChildRekey, ChildRekeyed, IkeRekey, IkeRekeyed
from mobike_ext.spi_update import (
    AGENT_WAIT,
    MIRROR_WAIT,
    Renamed,
    RenameRefused,
    SpiUpdate,
    Unsupported,
)
from tests.peers import a_context
from vici_bridge import exchanges
from vici_bridge.exchanges import MnMover, MnRenamer
from vici_bridge.policy.new_names import Told, Wish

ONE = MoveReport(messages=2, octets=200, requests=1)
NEW_IKE = b"our new."


class Mn:
    """Answers machines instead of a network; `said` is what came, with its message ID."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcome: str = "renamed") -> None:
        self.said: list[tuple[str, int]] = []
        self.outcome = outcome
        self.octets: list[bytes] = []
        self.patience: float | None = None
        """For which the MN's agent is waited."""
        self.answered = 0
        """Requests of its own for the same."""
        for name in ("run_spi_update", "run_rekey", "run_address_update"):
            monkeypatch.setattr(exchanges, name, getattr(self, name))

    def _sent(self, machine: Any) -> None:
        self.patience = getattr(machine, "_patience", None)
        self.octets += [datagram for datagram, _ in machine.to_send(0.0)]

    async def run_spi_update(self, machine: SpiUpdate, *, mark: int) -> SpiReport:
        asks = [("choose " if one.choose else "") + one.protocol.name for one in machine.asked]
        addresses = ["addresses"] if machine._part is not None else []
        self.said.append((", ".join([*addresses, *asks]), machine._asking.message_id))
        self._sent(machine)
        outcome: Renamed | RenameRefused | Unsupported = Unsupported()
        if self.outcome == "renamed":
            pairs = [
                Renaming(one.protocol, not one.choose, one.old, one.new or b"mn" + one.old[2:])
                for one in machine.asked
            ]
            outcome = Renamed(tuple(pairs))
        elif self.outcome == "refused":
            outcome = RenameRefused((Reason.NOT_ALLOWED,) * len(machine.asked))
        return SpiReport(replace(ONE, answered=self.answered), outcome)

    async def run_address_update(
        self, machine: AddressUpdate, *, mark: int, heard: object = None
    ) -> UpdateReport:
        self.said.append(("addresses", machine._asking.message_id))
        self._sent(machine)
        if self.outcome == "address refused":
            raise RefusedError("the MN refused the new address")
        return UpdateReport(ONE, PeerNatChanged(0, False, True) if self.outcome == "other NATs" else None)

    async def run_rekey(
        self, machine: ChildRekey | IkeRekey, *, made: Callable[[Any], Awaitable[None]], mark: int
    ) -> RekeyReport:
        self._sent(machine)
        if isinstance(machine, ChildRekey):
            self.said.append(("child", machine._asking.message_id))
            child = replace(a_context().children[0], spi_in=b"new1", spi_out=b"mn's", nonce_i=bytes(32))
            # in `run_rekey` the answer has come by now, and the message ID is used
            machine._asking.prove()
            try:
                await made(child)
            except RefusedError:
                self.said.append(("delete the new one", machine._asking.message_id))
                raise
            self.said.append(("delete", machine._asking.message_id))
            return RekeyReport(replace(ONE, requests=2), ChildRekeyed(child, True))
        self.said.append(("IKE", machine._asking.message_id))
        machine._asking.prove()
        old = machine.generation
        new = replace(old, spi_i=NEW_IKE, spi_r=b"the MN's", initiator=True, nonce_i=bytes(32))
        await made(new)
        self.said.append(("delete IKE", machine._asking.message_id))
        return RekeyReport(replace(ONE, requests=2), IkeRekeyed(new, True))


class Made:
    """What was to be installed, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[IkeContext, bool, str]] = []
        self.unfinished: list[bool] = []

    async def __call__(
        self, now: IkeContext, *, moved: bool, how: str, report: MoveReport, unfinished: bool = False
    ) -> None:
        self.calls.append((now, moved, how))
        self.unfinished.append(unfinished)


WISH = Wish(
    children=((a_context().children[0].spi_in, b"new1"),),
    ike=b"",
    addresses=True,
    update=True,
    rekey=True,
    seed=Secret(bytes(32)),
)


def ask(mn: Mn, made: Made, **wish: Any) -> Told:
    context = replace(a_context(), mid_initiator=7, mid_responder=3)
    spi_in = context.children[0].spi_in
    given: dict[str, Any] = {
        "children": ((spi_in, b"new1"),),
        "ike": b"",
        "addresses": True,
        "update": True,
        "rekey": True,
        "seed": Secret(bytes(32)),
        **wish,
    }
    renamer = MnRenamer((), 3, 0.1)
    return asyncio.run(_call(renamer, context, Wish(**given), made))


async def _call(renamer: MnRenamer, context: IkeContext, wish: Wish, made: Made) -> Told:
    return await renamer(context, wish, lambda: False, made)


def test_the_address_after_the_names_where_the_ike_sa_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch), Made()
    told = ask(mn, made, ike=NEW_IKE)
    # under its new name message IDs begin anew
    assert mn.said == [("ESP, choose ESP, IKE", 7), ("addresses", 0)]
    assert told == Told(ONE + ONE, True)
    assert [(moved, how) for _, moved, how in made.calls] == [(False, "update"), (True, "update")]
    first, last = made.calls[0][0], made.calls[-1][0]
    assert first.children[0].spi_in == b"new1"
    assert (first.mid_initiator, first.mid_responder) == (0, 0)
    assert last.spis[1] == NEW_IKE
    assert last.mid_initiator == 1


@pytest.mark.parametrize("agent", [True, False])
def test_an_agent_that_is_known_of_is_waited_for(monkeypatch: pytest.MonkeyPatch, agent: bool) -> None:
    mn = Mn(monkeypatch)
    ask(mn, Made(), agent=agent)
    assert mn.patience == (AGENT_WAIT if agent else MIRROR_WAIT)


def test_an_agent_that_has_asked_back_knows_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch), Made()
    mn.answered = 1
    ask(mn, made, ike=NEW_IKE)
    assert mn.said == [("ESP, choose ESP, IKE", 7)]
    assert [(moved, how) for _, moved, how in made.calls] == [(True, "update")]


def test_children_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch), Made()
    ask(mn, made)
    assert mn.said == [("addresses, ESP, choose ESP", 7)]
    assert made.calls[0][0].mid_initiator == 8


def test_a_kept_address_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch), Made()
    ask(mn, made, addresses=False)
    assert mn.said == [("ESP, choose ESP", 7)]


@pytest.mark.parametrize("outcome", ["unsupported", "refused"])
def test_rekeys_after_an_mn_that_does_not_rename(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    mn, made = Mn(monkeypatch, outcome), Made()
    told = ask(mn, made)
    assert mn.said == [("addresses, ESP, choose ESP", 7), ("child", 8), ("delete", 9)]
    assert told.supports is (outcome == "refused")
    assert told.report.requests == 3
    now, moved, how = made.calls[-1]
    assert (moved, how) == (True, "rekey")
    assert now.mid_initiator == 10
    # the new child is installed before the old one is deleted
    assert made.calls[1][0].children[0].spi_in == b"new1"
    assert made.calls[1][0].mid_initiator == 9
    assert made.calls[1][0].children[0].lifetime == a_context().children[0].lifetime


def test_rekeys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch), Made()
    told = ask(mn, made, update=False, ike=NEW_IKE)
    # the IKE_SA, then the child, and the address between its two requests
    assert mn.said == [
        ("IKE", 7),
        ("delete IKE", 8),
        ("child", 0),
        ("addresses", 1),
        ("delete", 2),
    ]
    assert told.supports is None
    assert told.report.requests == 5
    now, moved, _ = made.calls[-1]
    assert moved and now.mid_initiator == 3
    assert now.spis == (NEW_IKE, b"the MN's")


def test_b19_a_rekey_says_whether_its_next_message_id_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch, "unsupported"), Made()
    ask(mn, made, update=False)
    assert mn.said == [("child", 7), ("addresses", 8), ("delete", 9)]
    # the new child, the address, the end of the old child
    assert made.unfinished == [True, True, False]
    assert [now.mid_initiator for now, _, _ in made.calls] == [8, 9, 10]


def test_an_mn_that_must_not_be_rekeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch, "unsupported"), Made()
    with pytest.raises(RefusedError):
        ask(mn, made, rekey=False)


def test_other_nats_are_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ask(Mn(monkeypatch, "other NATs"), Made(), update=False)
    [told] = [record.getMessage() for record in caplog.records if "NAT" in record.getMessage()]
    assert told.endswith("here none, at the MN one")


def test_an_address_that_is_refused_has_used_its_message_id(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch, "address refused")
    with pytest.raises(RefusedError):
        ask(mn, Made(), update=False)
    assert mn.said == [("child", 7), ("addresses", 8), ("delete the new one", 9)]


@pytest.mark.parametrize("wish", [{}, {"update": False, "ike": NEW_IKE}, {"ike": NEW_IKE}])
def test_the_same_octets_after_a_crash(monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any]) -> None:
    first, second = Mn(monkeypatch), Made()
    ask(first, second, **wish)
    again = Mn(monkeypatch)
    ask(again, Made(), **wish)
    assert first.octets == again.octets
    other = Mn(monkeypatch)
    ask(other, Made(), seed=Secret(bytes(31) + b"\x01"), **wish)
    assert not set(first.octets) & set(other.octets)


def test_b3_a_request_that_says_something_else_after_a_restart_has_another_iv(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mn = Mn(monkeypatch)
    here = a_context()
    size = iv_length(here.current.encr)
    addresses: list[tuple[Address, ...]] = [(), (ip_address("203.0.113.1"),), (ip_address("203.0.113.2"),)]
    for further in (*addresses, addresses[0]):
        # the agent was restarted with another gateway.addresses while the transfer was moving
        asyncio.run(MnMover(further, 3, 0.1)(here, final_of(here), lambda: False))
        asyncio.run(_call(MnRenamer(further, 3, 0.1), here, WISH, Made()))
    moves, renames = mn.octets[0::2], mn.octets[1::2]
    for sent in (moves, renames):
        assert sent[3] == sent[0]  # the same request in the same octets: the MN answers it from its cache
        ivs = {datagram[4 + HEADER_LENGTH + 4 :][:size] for datagram in sent}
        assert len(ivs) == len(addresses)


def test_what_was_done_before_a_crash_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mn, made = Mn(monkeypatch), Made()
    ask(mn, made, children=(), update=False)
    assert mn.said == [("addresses", 7)]
    assert [moved for _, moved, _ in made.calls] == [True]
