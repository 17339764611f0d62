"""Why an SA cannot be moved: as `list` says it, and as a transfer is refused; and which HA version counts."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from ikectx.disk.store import SqliteStore
from ikectx.engine.hints import advice
from ikectx.errors import CharonError, IkectxError, RefusedError, UnknownSaError
from ikectx.numbers import IdType, Status
from ikectx.sa.context import IkeContext
from ikectx.sa.printed import printed
from tests.peers import a_context
from tests.vici_bridge.kernel.test_xfrm import GCM
from tests.vici_bridge.test_host import KEY, Vici, hear, host_of, nobody
from tests.vici_bridge.vici.test_views import VIEW
from vici_bridge.effects.source import CharonSource
from vici_bridge.ha.chain import import_messages
from vici_bridge.ha.messages import Attr, HaMessage, HaType
from vici_bridge.ha.record import COND_PPK
from vici_bridge.ha.version import HaVersion
from vici_bridge.kernel.xfrm import KernelSa
from vici_bridge.policy.obstacles import check_kernel, check_kind, octets_of
from vici_bridge.vici.views import sa_view


class Listing(Vici):
    """charon lists its SA with something more in it, and in its first CHILD_SA."""

    def __init__(self, context: IkeContext, more: dict[str, str], child: dict[str, str]) -> None:
        super().__init__(context)
        self.more, self.child = more, child

    def _view(self, context: IkeContext) -> dict[str, Any]:
        view = super()._view(context) | self.more
        next(iter(view["child-sas"].values())).update(self.child)
        return view


def without_encryption(message: HaMessage) -> HaMessage:
    """A CHILD_ADD as charon sends it for AH."""
    kept = tuple(pair for pair in message.attributes if pair[0] not in (Attr.ALG_ENCR, Attr.ALG_ENCR_LEN))
    return replace(message, attributes=kept) if message.type is HaType.CHILD_ADD else message


def no_children(message: HaMessage) -> HaMessage | None:
    return None if message.type is HaType.CHILD_ADD else message


def as_it_is(message: HaMessage) -> HaMessage | None:
    return message


OF_KINDS = {Status.PPK, Status.NOT_ESP, Status.LOCAL_VIP, Status.PER_CPU, Status.OFFLOADED}


@pytest.mark.parametrize(
    ("more", "child", "told", "reason"),
    [
        ({"ppk": "yes"}, {}, as_it_is, "postquantum preshared key"),
        ({}, {"protocol": "AH"}, without_encryption, "CHILD_SA rw is AH"),
        ({}, {}, without_encryption, "a CHILD_SA that is AH"),
        ({}, {"per-cpu-sas": "yes"}, no_children, "single CPUs"),
        ({}, {"cpu": "0"}, no_children, "single CPUs"),
    ],
)
def test_an_sa_of_a_kind_that_cannot_be_moved(
    more: dict[str, str],
    child: dict[str, str],
    told: Callable[[HaMessage], HaMessage | None],
    reason: str,
) -> None:
    async def scenario() -> None:
        context = a_context()
        async with host_of(Listing(context, more, child), SqliteStore(":memory:", KEY)) as host:
            for message in import_messages(context, 3):
                changed = told(message)
                if changed is not None:
                    host._hear(changed.serialize())
            (view,) = await host.views()
            found = host.obstacle(view)
            with pytest.raises(RefusedError, match=reason) as caught:
                await CharonSource(host, nobody).export(context.spis)
            for error in (found, caught.value):
                assert isinstance(error, RefusedError) and reason in str(error)
                assert error.status in OF_KINDS and error.exit_code == 4 and advice(error.status)
            assert host.knows(view), "there is nothing that a resync would tell"

    asyncio.run(scenario())


def test_a_gateway_that_is_itself_a_pools_client_and_what_charon_told_of_a_ppk() -> None:
    async def scenario(context: IkeContext, reason: str) -> None:
        async with host_of(Vici(context), SqliteStore(":memory:", KEY)) as host:
            host.record.learn(context, 3)
            (view,) = await host.views()
            with pytest.raises(RefusedError, match=reason) as caught:
                await CharonSource(host, nobody).export(context.spis)
            assert caught.value.status in OF_KINDS
            assert reason in str(host.obstacle(view))

    plain = a_context()
    asyncio.run(scenario(replace(plain, local_vips=plain.remote_vips), "virtual IP"))
    asyncio.run(scenario(replace(plain, conditions=COND_PPK), "postquantum"))


class Selecting(Vici):
    """Its IKE_SAs have numbers of their own, and the selectors of one mobile node; one has an if_id."""

    tagged = b""

    def _view(self, context: IkeContext) -> dict[str, Any]:
        view = super()._view(context) | {"uniqueid": str(context.current.spi_i[-1])}
        child = next(iter(view["child-sas"].values()))
        child |= {"local-ts": ["10.3.0.0/24"], "remote-ts": ["10.4.0.10/32"]}
        if context.current.spi_i == self.tagged:
            child["if-id-out"] = "0000002a"
        return view


def test_two_sas_of_a_mobile_node_with_one_policy() -> None:
    # where it has connected anew without INITIAL_CONTACT, or charon has unique = never (5.9.8: one reqid)
    async def scenario() -> None:
        first, second = a_context(1), a_context(2)
        child = replace(
            second.children[0], local_ts=first.children[0].local_ts, remote_ts=first.children[0].remote_ts
        )
        second = replace(second, remote_id=first.remote_id, children=(child,))
        vici = Selecting(first, second)
        async with host_of(vici, SqliteStore(":memory:", KEY)) as host:
            for context in (first, second):
                host.record.learn(context, 3)
            listed = await host.views()
            for view, other in zip(listed, (2, 1), strict=True):
                reason = f"another IKE_SA {view.name} #{other} here"
                assert reason in str(host.obstacle(view, listed)) and host.knows(view)
                with pytest.raises(RefusedError, match=reason):
                    await CharonSource(host, nobody).export(view.spis)
                await CharonSource(host, nobody).export(view.spis, away=True)  # it has left already
            vici.tagged = second.current.spi_i  # another route
            listed = await host.views()
            assert [host.obstacle(view, listed) for view in listed] == [None, None]
            del vici.contexts[1]  # charon has not told that it is gone
            (view,) = await host.views()
            assert host.obstacle(view, [view]) is None
            await CharonSource(host, nobody).export(view.spis)
            host.record.forget(second.spis)
            assert host.record.alike(first.spis) == []

    asyncio.run(scenario())


def test_an_sa_that_is_not_known() -> None:
    async def scenario() -> None:
        context = a_context()
        async with host_of(Vici(context), SqliteStore(":memory:", KEY)) as host:
            (view,) = await host.views()
            found = host.obstacle(view)
            assert isinstance(found, UnknownSaError) and "no agent ran" in str(found)
            assert "resync" in found.hint and not host.knows(view)
            hear(host, context)
            assert host.obstacle(view) is None and host.knows(view)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ((35, struct.pack("=I", 2)), "for CPU 2 alone"),
        ((28, struct.pack("=iBxxx", 3, 4)), "network card"),
        ((28, struct.pack("=iBxxx", 3, 2)), ""),
        ((33, b"\x01"), ""),
    ],
)
def test_what_the_kernel_has_decides(extra: tuple[int, bytes], reason: str) -> None:
    sa = KernelSa.parse(replace(GCM, extra=(extra,)).add().message.reveal())
    if not reason:
        check_kernel("net", sa)
        return
    with pytest.raises(RefusedError, match=reason) as caught:
        check_kernel("net", sa)
    assert caught.value.status in OF_KINDS and "c0ffee01" in str(caught.value)


# --- charon upgraded under a running agent -----------------------------------------------------------------


def test_the_wire_version_follows_charon() -> None:
    version = HaVersion()
    version.check()
    assert (version.charon, version.number, version.problem) == ("", None, "")
    version.told("5.9.8")
    assert version.number == 3
    version.told("6.0.1")
    assert (version.charon, version.number) == ("6.0.1", 4)
    assert version.heard(b"\x05\x01") and not version.heard(b"\x05\x02")
    version.told("6.0.1")  # VICI was away for a moment: the stream knows better
    assert version.number == 5
    version.told("5.9.8")
    assert version.number == 3
    assert not version.heard(b"")


def test_a_charon_of_another_version_is_spoken_to_as_such() -> None:
    async def scenario() -> None:
        context = a_context()
        vici = Vici(context)
        async with host_of(vici, SqliteStore(":memory:", KEY)) as host:
            hear(host, context)
            await host._reconcile()
            assert await host.version() == 3
            vici.told = "6.0.1"
            await host._reconcile()
            assert (await host.version(), host.ha_version.charon) == (4, "6.0.1")
            for message in import_messages(context, 5):
                host._hear(message.serialize())
            assert await host.version() == 5

    asyncio.run(scenario())


def test_a_wire_version_of_the_future_is_told_as_such(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        context = a_context()
        vici = Vici(context)
        vici.told = "6.9.0"
        async with host_of(vici, SqliteStore(":memory:", KEY)) as host:
            await host._reconcile()
            caplog.clear()
            for message in import_messages(context, 5):
                host._hear(b"\x09" + message.serialize()[1:])
            said = "charon 6.9.0 speaks HA wire version 9, this ikectx knows 3, 4, 5"
            assert caplog.text.count(said) == 1 and "unreadable" not in caplog.text
            (view,) = await host.views()
            tried: list[IkectxError | None] = [host.obstacle(view)]
            for attempt in (host.version(), CharonSource(host, nobody).export(context.spis), host.resync()):
                with pytest.raises(CharonError) as caught:
                    await attempt
                tried.append(caught.value)
            for error in tried:
                assert isinstance(error, CharonError) and str(error) == said
                assert "upgrade ikectx" in error.hint and error.exit_code == 10
            caplog.clear()
            await host._reconcile()
            assert "came up while" not in caplog.text, "a resync would not help"

    asyncio.run(scenario())


def test_the_length_of_an_identity_is_known_from_its_text() -> None:
    """charon's listing has no octets, and its HA message about a longer identity cannot be read."""
    ou = NameOID.ORGANIZATIONAL_UNIT_NAME
    parts = [
        (NameOID.COUNTRY_NAME, "CH"),
        (NameOID.COMMON_NAME, "zoë, Außendienst"),
        (NameOID.EMAIL_ADDRESS, "a@b"),
    ]
    for several in (0, 3, 6, 7, 8, 12):
        names = [*parts, *[(ou, f"Amt für {number}") for number in range(several)]]
        octets = x509.Name([x509.NameAttribute(oid, value) for oid, value in names]).public_bytes()
        assert octets_of(printed(IdType.DER_ASN1_DN, octets)) == len(octets)
    assert octets_of("a" * 255) == 255


def test_an_identity_that_ha_cannot_express_is_named() -> None:
    view = sa_view(
        "mn", {**VIEW, "remote-id": "C=CH, " + ", ".join(f"OU=Aussenstelle {i}" for i in range(12))}
    )
    with pytest.raises(RefusedError, match="more than 255 octets") as caught:
        check_kind(view)
    assert "resync" not in caught.value.hint
