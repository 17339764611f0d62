"""Every error this project raises, drawn once.

    IkectxError
    +-- WireError          bytes from outside that do not parse       the sender's fault
    +-- RefusedError       the other gateway or the MN said no        the peer's decision
    |   +-- ProofError     a packet is no proof that the MN is there  a stranger's, or a late packet's
    |   +-- TokenError     a MN's token is not accepted (in `tokens`) the CTAR's sender's
    +-- LinkError          no connection, no answer, no TLS           the network's fault
    +-- UsageError         an argument the caller got wrong           the caller's fault
    |   +-- ConfigError    a key of the configuration file            (names file, key, line)
    |   +-- UnknownSaError no SA answers to that name
    +-- BusyError          the SA is in the middle of an exchange     nobody's: try again
    +-- StateError         a step out of order, or an open transfer   ours
    +-- NoAddressError     this gateway has no address of the MN's family  ours (configuration)
    +-- StoreError         the journal or the record cannot be used   ours
    +-- CharonError        charon is absent, refused or did not do it charon's
    +-- KernelError        netlink answered with an errno             the kernel's

Each class has the exit code of the command line (`exit_code`) and the status a
gateway puts into a CTDR when the error ends a transfer (`status`, see
`numbers.Status`). Foreign bytes can raise only `WireError`. Messages never hold
key material.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .numbers import Status


class IkectxError(Exception):
    """Base of all errors. `hint` says what the operator can do next."""

    exit_code = 1
    status = Status.FAILED

    def __init__(self, message: str, *, hint: str = "", status: Status | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if status is not None:
            self.status = status


class WireError(IkectxError):
    """Bytes that do not follow their format; says at which octet where it is known."""

    exit_code = 3
    status = Status.MALFORMED


class RefusedError(IkectxError):
    """The other gateway, or the MN, refused; `status` holds its reason."""

    exit_code = 4
    status = Status.FAILED


class ProofError(RefusedError):
    """A packet does not prove that the mobile node is where it was seen; the text says why."""

    status = Status.NOT_ALLOWED


class LinkError(IkectxError):
    """The other side cannot be reached, did not answer, or failed TLS."""

    exit_code = 5
    status = Status.UNREACHABLE


class UsageError(IkectxError):
    """The caller's argument is wrong."""

    exit_code = 2
    status = Status.MALFORMED


class ConfigError(UsageError):
    """The configuration file is wrong: message names file, key and line."""


class UnknownSaError(UsageError):
    """No IKE_SA (or CHILD_SA) answers to that name, or more than one does."""

    exit_code = 6
    status = Status.UNKNOWN_SA


class BusyError(IkectxError):
    """The SA has an exchange in flight; trying again later is the right answer."""

    exit_code = 7
    status = Status.BUSY


class StateError(IkectxError):
    """A step that is not allowed in this state of a transfer."""

    exit_code = 8
    status = Status.FAILED


class NoAddressError(IkectxError):
    """This gateway has no outer address of the MN's address family (4 or 6)."""

    exit_code = 4
    status = Status.NO_ADDRESS

    def __init__(self, family: int) -> None:
        super().__init__(
            f"this gateway has no IPv{family} address to serve the MN on",
            hint="add one to gateway.addresses in the configuration",
        )


class StoreError(IkectxError):
    """The journal or the record on disk is unreadable or not ours."""

    exit_code = 9


class CharonError(IkectxError):
    """charon is not there, answered an error, or did not do what it was told."""

    exit_code = 10
    status = Status.CHARON


class KernelError(IkectxError):
    """The kernel refused a netlink request; `errno` is its answer (0: unknown)."""

    exit_code = 11
    status = Status.KERNEL

    def __init__(self, message: str, *, errno: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Around the parsing of something from the store, which another version may have written, or a disk may
    have damaged: whatever that raises becomes one StoreError. Its text is not repeated, because it may be a
    value."""
    try:
        yield
    except IkectxError as error:
        raise (
            error if isinstance(error, StoreError) else StoreError(f"{what} cannot be read: {error}")
        ) from None
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as error:
        raise StoreError(f"{what} cannot be read ({type(error).__name__})") from None
