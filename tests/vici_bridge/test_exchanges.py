"""What is said to an MN whose SPIs are taken, in which order, and under which message IDs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ikectx.engine.ports import MoveReport
from ikectx.errors import RefusedError
from ikectx.numbers import Protocol
from ikectx.sa.context import Address, IkeContext, Secret
from ikectx.sa.keys import iv_length
from ikectx.wire.full_ctd import final_of
from ikectx.wire.ikev2 import HEADER_LENGTH
from mobike_ext import naming
from mobike_ext.address_update import AddressUpdate
from mobike_ext.link import SpiReport
from mobike_ext.naming import MOST, Renaming
from mobike_ext.notify import Reason, UpdateSpi
from mobike_ext.rekey import ChildMade, ChildRekey, IkeMade, IkeRekey, RekeyState
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
from vici_bridge.policy.new_names import Agreed, Wish

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
        for name in ("run_spi_update", "ask_rekey", "end_rekey", "run_address_update"):
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
    ) -> MoveReport:
        self.said.append(("addresses", machine._asking.message_id))
        self._sent(machine)
        if self.outcome == "address refused":
            raise RefusedError("the MN refused the new address")
        return ONE

    async def ask_rekey(self, machine: ChildRekey | IkeRekey, *, mark: int) -> ChildMade | IkeMade:
        self._sent(machine)
        self.said.append(("child" if isinstance(machine, ChildRekey) else "IKE", machine._asking.message_id))
        machine._asking.prove()  # the answer has come, and the message ID is used
        machine.state = RekeyState.MADE
        if isinstance(machine, ChildRekey):
            new = replace(a_context().children[0], spi_in=b"new1", spi_out=b"mn's", nonce_i=bytes(32))
            return ChildMade(new)
        old = machine.generation
        return IkeMade(replace(old, spi_i=NEW_IKE, spi_r=b"the MN's", initiator=True, nonce_i=bytes(32)))

    async def end_rekey(self, machine: ChildRekey | IkeRekey, *, mark: int) -> None:
        what = "delete" if isinstance(machine, ChildRekey) else "delete IKE"
        if machine.state is RekeyState.DISCARDING:
            what = "delete the new one"
        self.said.append((what, machine._asking.message_id))
        self._sent(machine)


WISH = Wish(
    children=((a_context().children[0].spi_in, b"new1"),),
    ike=b"",
    addresses=True,
    update=True,
    seed=Secret(bytes(32)),
)


def ask(**wish: Any) -> list[Agreed]:
    """What the MN agrees to, in order."""
    context = replace(a_context(), mid_initiator=7, mid_responder=3)
    return asyncio.run(_all(MnRenamer((), 3, 0.1), context, replace(WISH, **wish)))


async def _all(renamer: MnRenamer, context: IkeContext, wish: Wish) -> list[Agreed]:
    talk, found = renamer(context, wish), []
    while (agreed := await talk.next()) is not None:
        found.append(agreed)
    return found


def cost(agreed: list[Agreed]) -> MoveReport:
    return sum((one.report for one in agreed), MoveReport())


def test_the_address_after_the_names_where_the_ike_sa_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch)
    agreed = ask(ike=NEW_IKE)
    # under its new name message IDs begin anew
    assert mn.said == [("ESP, choose ESP, IKE", 7), ("addresses", 0)]
    assert cost(agreed) == ONE + ONE
    assert [(one.moved, one.how, one.supports) for one in agreed] == [
        (False, "update", True),
        (True, "update", True),
    ]
    first, last = agreed[0].now, agreed[-1].now
    assert first.children[0].spi_in == b"new1"
    assert (first.mid_initiator, first.mid_responder) == (0, 0)
    assert last.spis[1] == NEW_IKE
    assert last.mid_initiator == 1


@pytest.mark.parametrize("agent", [True, False])
def test_an_agent_that_is_known_of_is_waited_for(monkeypatch: pytest.MonkeyPatch, agent: bool) -> None:
    mn = Mn(monkeypatch)
    ask(agent=agent)
    assert mn.patience == (AGENT_WAIT if agent else MIRROR_WAIT)


def test_an_agent_that_has_asked_back_knows_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch)
    mn.answered = 1
    agreed = ask(ike=NEW_IKE)
    assert mn.said == [("ESP, choose ESP, IKE", 7)]
    assert [(one.moved, one.how) for one in agreed] == [(True, "update")]


def test_children_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch)
    [agreed] = ask()
    assert mn.said == [("addresses, ESP, choose ESP", 7)]
    assert agreed.now.mid_initiator == 8


def test_a_kept_address_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch)
    ask(addresses=False)
    assert mn.said == [("ESP, choose ESP", 7)]


@pytest.mark.parametrize("outcome", ["unsupported", "refused"])
def test_rekeys_after_an_mn_that_does_not_rename(monkeypatch: pytest.MonkeyPatch, outcome: str) -> None:
    mn = Mn(monkeypatch, outcome)
    agreed = ask()
    assert mn.said == [("addresses, ESP, choose ESP", 7), ("child", 8), ("delete", 9)]
    assert {one.supports for one in agreed} == {outcome == "refused"}
    assert cost(agreed).requests == 3
    last = agreed[-1]
    assert (last.moved, last.how) == (True, "rekey")
    assert last.now.mid_initiator == 10
    # the new child is installed before the old one is deleted
    new = agreed[1].now
    assert new.children[0].spi_in == b"new1"
    assert new.mid_initiator == 9
    assert new.children[0].lifetime == a_context().children[0].lifetime


def test_rekeys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch)
    agreed = ask(update=False, ike=NEW_IKE)
    # the IKE_SA, then the child, and the address between its two requests
    assert mn.said == [
        ("IKE", 7),
        ("delete IKE", 8),
        ("child", 0),
        ("addresses", 1),
        ("delete", 2),
    ]
    last = agreed[-1]
    assert last.supports is None
    assert cost(agreed).requests == 5
    assert last.moved and last.now.mid_initiator == 3
    assert last.now.spis == (NEW_IKE, b"the MN's")


def test_b19_a_rekey_says_whether_its_next_message_id_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch, "unsupported")
    agreed = ask(update=False)
    assert mn.said == [("child", 7), ("addresses", 8), ("delete", 9)]
    # the new child, the address, the end of the old child
    assert [one.unfinished for one in agreed] == [True, True, False]
    assert [one.now.mid_initiator for one in agreed] == [8, 9, 10]


@pytest.mark.parametrize(
    ("wish", "exchanges", "said"),
    [
        ({}, 1, "delete the new one"),
        ({}, 2, "delete the new one"),
        ({"ike": NEW_IKE}, 1, "IKE"),  # the MN has moved its children to it
        ({"ike": NEW_IKE}, 2, "delete IKE"),
    ],
)
def test_a_child_that_cannot_be_installed_is_given_back(
    monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any], exchanges: int, said: str
) -> None:
    mn = Mn(monkeypatch)

    async def installing() -> None:
        talk = MnRenamer((), 3, 0.1)(a_context(), replace(WISH, update=False, **wish))
        for _ in range(exchanges):
            await talk.next()
        await talk.give_up("no memory")

    asyncio.run(installing())
    assert mn.said[-1][0] == said


def test_an_address_that_is_refused_has_used_its_message_id(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch, "address refused")
    with pytest.raises(RefusedError):
        ask(update=False)
    assert mn.said == [("child", 7), ("addresses", 8), ("delete the new one", 9)]


@pytest.mark.parametrize("wish", [{}, {"update": False, "ike": NEW_IKE}, {"ike": NEW_IKE}])
def test_the_same_octets_after_a_crash(monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any]) -> None:
    first = Mn(monkeypatch)
    ask(**wish)
    again = Mn(monkeypatch)
    ask(**wish)
    assert first.octets == again.octets
    other = Mn(monkeypatch)
    ask(seed=Secret(bytes(31) + b"\x01"), **wish)
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
        asyncio.run(_all(MnRenamer(further, 3, 0.1), here, WISH))
    moves, renames = mn.octets[0::2], mn.octets[1::2]
    for sent in (moves, renames):
        assert sent[3] == sent[0]  # the same request in the same octets: the MN answers it from its cache
        ivs = {datagram[4 + HEADER_LENGTH + 4 :][:size] for datagram in sent}
        assert len(ivs) == len(addresses)


def test_what_was_done_before_a_crash_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mn = Mn(monkeypatch)
    [agreed] = ask(children=(), update=False)
    assert mn.said == [("addresses", 7)]
    assert agreed.moved


@pytest.mark.parametrize("children", [1, 7, 8, 16, 17, 40])
@pytest.mark.parametrize("ike", [False, True])
@pytest.mark.parametrize("last_first", [False, True])
def test_both_directions_of_a_child_are_in_one_request(children: int, ike: bool, last_first: bool) -> None:
    # renamed by half, it would be installed under an SPI of another mobile node's SA
    left: list[UpdateSpi] = []
    for number in range(children):
        spi = (0xC2000001 + number).to_bytes(4)
        left += [
            naming.ask(Protocol.ESP, b"\xc0" + spi[1:], b"\xc1" + spi[1:]),
            naming.ask_peer(Protocol.ESP, spi),
        ]
    left += [naming.ask(Protocol.IKE, b"oldoldol", b"newnewne")] * ike
    asked: list[UpdateSpi] = []
    while left:
        asks, left = exchanges._in_one_request(left, last_first)
        assert 0 < len(asks) <= MOST
        ours = [one for one in asks if one.protocol is Protocol.ESP]
        assert [one.choose for one in ours] == [False, True] * (len(ours) // 2)
        if last_first and ike and not asked:
            assert asks[-1].protocol is Protocol.IKE
        asked += asks
    assert len(asked) == 2 * children + ike
