"""Certificates, keys, CAs and revocation lists of TLS, and that they are read anew."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from ikectx.errors import ConfigError, LinkError
from ikectx.net.credentials import DAY, Credentials, TlsConfig
from ikectx.net.links import Stream
from ikectx.net.tls import tls_dial, tls_listen
from ikectx.peer import PeerConfig
from ikectx.timing import Timing
from tests import hand_loop
from tests.certs import Authority
from tests.hand_loop import run_bounded as run

TIMING = Timing(connect=10.0, keepalive=10.0)
HERE = [PeerConfig("here", "127.0.0.1")]


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def listening(credentials: Credentials) -> AsyncIterator[tuple[PeerConfig, asyncio.Queue[Stream]]]:
    """The peer "b" that listens with these, and the connections that it lets in."""
    accepted: asyncio.Queue[Stream] = asyncio.Queue()
    (door,) = await tls_listen(credentials, TIMING, [("127.0.0.1", 0)], accepted.put, HERE)
    await door.start_serving()
    try:
        yield PeerConfig("b", *door.address), accepted
    finally:
        door.close()


async def ended(stream: Stream) -> bool:
    """Whether the other side has ended it, without a message."""
    try:
        return await stream.read() == b""
    except LinkError:
        return True
    finally:
        stream.close()


def test_b25_a_revoked_certificate_is_refused_by_both(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = ca.issue("a"), ca.issue("b")
    lists = (ca.revoke(a.cert),)
    a_holds, b_holds = replace(a, revocation_lists=lists), replace(b, revocation_lists=lists)

    async def scenario() -> None:
        async with listening(Credentials(b_holds)) as (peer, accepted):
            stream = await tls_dial(Credentials(a), TIMING)(peer)
            assert await ended(stream)
            assert accepted.empty()
        assert "certificate revoked" in caplog.text
        ca.revoke(b.cert)
        async with listening(Credentials(b)) as (peer, _):
            with pytest.raises(LinkError, match="certificate revoked"):
                await tls_dial(Credentials(a_holds), TIMING)(peer)

    run(scenario())


def test_the_link_of_a_certificate_that_is_revoked_ends(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    a, other, b = ca.issue("a"), ca.issue("other"), ca.issue("b")
    held = Credentials(replace(b, revocation_lists=(ca.revoke(),)))

    async def scenario() -> None:
        async with listening(held) as (peer, accepted):
            near = await tls_dial(Credentials(a), TIMING)(peer)
            far = await accepted.get()
            good = await tls_dial(Credentials(other), TIMING)(peer)
            good_far = await accepted.get()
            reading = asyncio.create_task(far.read())
            await asyncio.sleep(0)
            ca.revoke(a.cert)
            held.look()  # as the timer does
            with pytest.raises(LinkError, match="was revoked on 2"):
                await reading
            assert await ended(near)
            await good.write(b"on")
            assert await good_far.read() == b"on"
            assert await ended(await tls_dial(Credentials(a), TIMING)(peer))
            good.close()

    run(scenario())
    assert "its certificate was revoked on" in caplog.text


@pytest.mark.parametrize("count", [False, True])
def test_an_expired_list_does_what_is_configured(ca: Authority, count: bool) -> None:
    a, b, bad = ca.issue("a"), ca.issue("b"), ca.issue("bad")
    lists = (ca.revoke(bad.cert, days=-1),)
    held = Credentials(replace(b, revocation_lists=lists, expired_count=count))
    assert [text for text in held.expiring() if "is past its next update" in text]

    async def scenario() -> None:
        async with listening(held) as (peer, accepted):
            near = await tls_dial(Credentials(a), TIMING)(peer)
            if count:
                await near.write(b"on")
                assert await (await accepted.get()).read() == b"on"
                near.close()
            else:
                assert await ended(near)
            assert await ended(await tls_dial(Credentials(bad), TIMING)(peer))
            assert accepted.empty()

    run(scenario())


@pytest.mark.parametrize("count", [False, True])
def test_with_lists_each_issuer_needs_one(ca: Authority, tmp_path: Path, count: bool) -> None:
    (tmp_path / "two").mkdir()
    two = Authority(tmp_path / "two", "two")
    both = tmp_path / "both.pem"
    both.write_bytes(ca.path.read_bytes() + two.path.read_bytes())
    b = replace(ca.issue("b", trusts=both), revocation_lists=(ca.revoke(),), expired_count=count)

    async def scenario() -> None:
        async with listening(Credentials(b)) as (peer, _):
            assert await ended(await tls_dial(Credentials(two.issue("a", trusts=ca.path)), TIMING)(peer))

    run(scenario())


@pytest.mark.parametrize("count", [False, True])
def test_an_intermediate_ca_that_is_revoked_ends_links_and_is_refused(
    ca: Authority, tmp_path: Path, count: bool
) -> None:
    sub = ca.below("sub")
    both = tmp_path / "both.pem"
    both.write_bytes(ca.path.read_bytes() + sub.path.read_bytes())
    lists = (ca.revoke(), sub.revoke())
    held = Credentials(replace(ca.issue("b", trusts=both), revocation_lists=lists, expired_count=count))
    a = Credentials(sub.issue("a", trusts=ca.path))

    async def scenario() -> None:
        async with listening(held) as (peer, accepted):
            near = await tls_dial(a, TIMING)(peer)
            reading = asyncio.create_task((await accepted.get()).read())
            await asyncio.sleep(0)
            ca.revoke(sub.path)
            held.look()
            with pytest.raises(LinkError, match="CN=sub was revoked on 2"):
                await reading
            assert await ended(near)
            assert await ended(await tls_dial(a, TIMING)(peer))
            assert accepted.empty()

    run(scenario())


def test_certificates_are_looked_at_after_a_mistake_too(
    ca: Authority, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = Credentials(ca.issue("b"))

    async def scenario() -> None:
        looked = 0

        def bad() -> None:
            nonlocal looked
            looked += 1
            raise ZeroDivisionError

        monkeypatch.setattr(held, "look", bad)
        tending = asyncio.create_task(held.tend())
        await asyncio.sleep(25.0)
        assert looked == 3, "it looks on all the same"
        tending.cancel()

    hand_loop.run(scenario())
    assert "a look at certificates: ZeroDivisionError" in caplog.text


def test_b25_new_files_are_used_without_a_restart(
    ca: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "new").mkdir()
    new = Authority(tmp_path / "new", "new")
    b = ca.issue("b")
    held = Credentials(b)

    async def scenario() -> None:
        async with listening(held) as (peer, accepted):
            near = await tls_dial(Credentials(ca.issue("a")), TIMING)(peer)
            far = await accepted.get()
            following = new.issue("b")
            shutil.copy(following.cert, b.cert)
            caplog.clear()
            held.look()  # between the two files: what was read before stays in use
            assert "key" in caplog.text
            assert [record.levelno for record in caplog.records] == [logging.ERROR]
            (await tls_dial(Credentials(ca.issue("a")), TIMING)(peer)).close()
            shutil.copy(following.key, b.key)
            shutil.copy(new.path, b.ca)
            # the next handshake looks by itself
            assert await ended(await tls_dial(Credentials(ca.issue("a")), TIMING)(peer))
            (await tls_dial(Credentials(new.issue("a")), TIMING)(peer)).close()
            # the CA that had issued this one is not in the file any more
            with pytest.raises(LinkError, match="none of the CAs"):
                await far.read()
            assert await ended(near)

    run(scenario())


def test_a_certificate_that_expires_meanwhile_ends_its_link(ca: Authority) -> None:
    now = time.time()
    held = Credentials(ca.issue("b"), lambda: now)

    async def scenario() -> None:
        nonlocal now
        async with listening(held) as (peer, accepted):
            near = await tls_dial(Credentials(ca.issue("a", days=20)), TIMING)(peer)
            far = await accepted.get()
            now += 19 * DAY
            held.drop()
            await near.write(b"on")
            assert await far.read() == b"on"
            now += 2 * DAY
            held.drop()
            with pytest.raises(LinkError, match="has expired on"):
                await far.read()
            near.close()

    run(scenario())


def test_what_expires_is_told_once_a_day(ca: Authority) -> None:
    now = time.time()
    held = Credentials(ca.issue("b", days=31), lambda: now)
    assert not list(held.expiring())
    now += 2 * DAY
    (text,) = held.expiring()
    assert text.startswith("the certificate of this gateway expires on 2")
    assert not list(held.expiring())
    now += DAY
    assert len(list(held.expiring())) == 1
    now += 400 * DAY
    assert {text.rpartition(" on ")[0] for text in held.expiring()} == {
        "the certificate of this gateway has expired",
        "the CA CN=ca has expired",
    }


def test_unusable_lists_name_the_file(ca: Authority, tmp_path: Path) -> None:
    b = ca.issue("b")
    path = ca.revoke()

    def wrong(found: str, config: TlsConfig) -> None:
        with pytest.raises(ConfigError, match=found):
            Credentials(config)

    wrong("gone.crl: No such file", replace(b, revocation_lists=(tmp_path / "gone.crl",)))
    (tmp_path / "empty.crl").write_bytes(b"no list")
    wrong("empty.crl", replace(b, revocation_lists=(tmp_path / "empty.crl",)))
    (tmp_path / "other").mkdir()
    foreign = Authority(tmp_path / "other").revoke()  # a CA of the same name, with another key
    wrong("has signed the revocation list of CN=ca", replace(b, revocation_lists=(foreign,)))
    trusted = tmp_path / "trusted.pem"
    trusted.write_text(ca.path.read_text().replace(" CERTIFICATE", " TRUSTED CERTIFICATE"))
    wrong("trusted.pem", replace(b, ca=trusted, revocation_lists=(path,)))
    held = Credentials(replace(b, revocation_lists=(path,)))
    os.unlink(path)
    held.look()
    assert held.context(server=True) is held.context(server=True)
    with pytest.raises(ConfigError, match="No such file"):
        held.reload()
