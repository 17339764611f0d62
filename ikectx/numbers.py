"""Numbers of IANA, of RFC 4067 and our own, as open enums: an unknown value keeps its number.

Sources: IANA "IKEv2 Parameters" registry; RFC 4065/4067 for CXTP; the private
ranges are documented in docs/protocol.md.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class OpenEnum(IntEnum):
    """An IntEnum to which every non-negative integer belongs; unknown ones are named UNKNOWN_n."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, int) or value < 0:
            return None
        member = int.__new__(cls, value)
        member._name_ = f"UNKNOWN_{value}"
        member._value_ = value
        return member


class Prf(OpenEnum):
    """IKEv2 transform type 2."""

    HMAC_MD5 = 1
    HMAC_SHA1 = 2
    AES128_XCBC = 4
    HMAC_SHA2_256 = 5
    HMAC_SHA2_384 = 6
    HMAC_SHA2_512 = 7
    AES128_CMAC = 8


class Encr(OpenEnum):
    """IKEv2 transform type 1 (ESP and IKE)."""

    DES3 = 3
    NULL = 11
    AES_CBC = 12
    AES_CTR = 13
    AES_CCM_8 = 14
    AES_CCM_12 = 15
    AES_CCM_16 = 16
    AES_GCM_8 = 18
    AES_GCM_12 = 19
    AES_GCM_16 = 20
    NULL_AES_GMAC = 21
    CAMELLIA_CBC = 23
    CAMELLIA_CTR = 24
    CHACHA20_POLY1305 = 28


class Integ(OpenEnum):
    """IKEv2 transform type 3; NONE is 0 (AEAD)."""

    NONE = 0
    HMAC_MD5_96 = 1
    HMAC_SHA1_96 = 2
    AES_XCBC_96 = 5
    HMAC_SHA1_160 = 7
    AES_CMAC_96 = 8
    HMAC_SHA2_256_128 = 12
    HMAC_SHA2_384_192 = 13
    HMAC_SHA2_512_256 = 14


class KeMethod(OpenEnum):
    """IKEv2 transform type 4; NONE is 0."""

    NONE = 0
    MODP_1024 = 2
    MODP_1536 = 5
    MODP_2048 = 14
    MODP_3072 = 15
    MODP_4096 = 16
    MODP_6144 = 17
    MODP_8192 = 18
    ECP_256 = 19
    ECP_384 = 20
    ECP_521 = 21
    ECP_192 = 25
    ECP_224 = 26
    BRAINPOOL_256 = 28
    CURVE_25519 = 31
    CURVE_448 = 32
    ML_KEM_512 = 35
    ML_KEM_768 = 36
    ML_KEM_1024 = 37


class Protocol(OpenEnum):
    """IKEv2 security protocol identifiers (RFC 7296, 3.3.1)."""

    NONE = 0
    IKE = 1
    AH = 2
    ESP = 3


class Mode(OpenEnum):
    """CHILD_SA mode as strongSwan numbers it (ipsec_mode_t)."""

    TRANSPORT = 1
    TUNNEL = 2
    BEET = 4


class IdType(OpenEnum):
    """IKEv2 identification types (RFC 7296, 3.5); ANY is strongSwan's 0."""

    ANY = 0
    IPV4_ADDR = 1
    FQDN = 2
    RFC822_ADDR = 3
    IPV6_ADDR = 5
    DER_ASN1_DN = 9
    DER_ASN1_GN = 10
    KEY_ID = 11


class Exchange(OpenEnum):
    """IKEv2 exchange types."""

    IKE_SA_INIT = 34
    IKE_AUTH = 35
    CREATE_CHILD_SA = 36
    INFORMATIONAL = 37
    IKE_INTERMEDIATE = 43


class Payload(OpenEnum):
    """IKEv2 payload types."""

    NONE = 0
    SA = 33
    KE = 34
    IDI = 35
    IDR = 36
    CERT = 37
    CERTREQ = 38
    AUTH = 39
    NONCE = 40
    NOTIFY = 41
    DELETE = 42
    VENDOR = 43
    TSI = 44
    TSR = 45
    SK = 46
    CP = 47
    EAP = 48
    SKF = 53


class Notify(OpenEnum):
    """IKEv2 notify message types used here; errors are below 16384."""

    UNSUPPORTED_CRITICAL_PAYLOAD = 1
    INVALID_IKE_SPI = 4
    INVALID_SYNTAX = 7
    INVALID_MESSAGE_ID = 9
    INVALID_SPI = 11
    NO_PROPOSAL_CHOSEN = 14
    INVALID_KE_PAYLOAD = 17
    AUTHENTICATION_FAILED = 24
    NO_ADDITIONAL_SAS = 35
    TS_UNACCEPTABLE = 38
    UNACCEPTABLE_ADDRESSES = 40
    UNEXPECTED_NAT_DETECTED = 41
    TEMPORARY_FAILURE = 43
    CHILD_SA_NOT_FOUND = 44
    NAT_DETECTION_SOURCE_IP = 16388
    NAT_DETECTION_DESTINATION_IP = 16389
    IPCOMP_SUPPORTED = 16387
    USE_TRANSPORT_MODE = 16391
    REKEY_SA = 16393
    ESP_TFC_PADDING_NOT_SUPPORTED = 16394
    MOBIKE_SUPPORTED = 16396
    ADDITIONAL_IP4_ADDRESS = 16397
    ADDITIONAL_IP6_ADDRESS = 16398
    NO_ADDITIONAL_ADDRESSES = 16399
    UPDATE_SA_ADDRESSES = 16400
    COOKIE2 = 16401
    NO_NATS_ALLOWED = 16402
    REDIRECT = 16407
    UPDATE_SPI_SUPPORTED = 41960
    UPDATE_SPI = 41961
    UPDATE_SPI_REFUSED = 41962
    INVITATION = 41963


class Cxtp(OpenEnum):
    """RFC 4067 message types."""

    CTAR = 1
    CTAA = 2
    CTD = 3
    PCTD = 4
    CTDR = 5
    CTC = 6
    CT_REQ = 7


class Fpt(OpenEnum):
    """Feature Profile Types. 0x0001 is RFC 4065's; ours are from the experimental range 0xFF00-0xFFFF.

    The last ten are not parts of a context:

    - MN_TOKEN: authenticates a CTAR or CTAA.
    - PROOF: IKE datagrams of the mobile node, as evidence in a CT-Req.
    - NEW_SPIS: the SPIs that SAs have from now on. In a CTDR, a status: the mobile node will be given others.
    - REQUEST: only a status in a CTDR, answers a CT-Req.
    - GO_ON: only a status in a CTDR, asks the old gateway to go on sending ESP until the next CTDR.
    - WHEREABOUTS: tells the gateway that an SA came from where the SA is.
    - REASON: why a context was refused, in words.
    - COOKIE: a gateway under load asks the sender of a CTAR to send it back.
    - LEAVING: the mobile node leaves at once. In a CTDR, a status: its packets are held until it arrives.
    - RELAY: in a CTDR, the address to which the old gateway passes on what the mobile node sends.
    """

    MLD = 0x0001
    IKEV2_SA = 0xFF01
    SAD = 0xFF02
    SPD = 0xFF03
    PAD = 0xFF04
    MN_TOKEN = 0xFF05
    PROOF = 0xFF06
    NEW_SPIS = 0xFF07
    REQUEST = 0xFF08
    GO_ON = 0xFF09
    WHEREABOUTS = 0xFF0A
    REASON = 0xFF0B
    COOKIE = 0xFF0C
    LEAVING = 0xFF0D
    RELAY = 0xFF0E


class Status(OpenEnum):
    """Status octet of CTDR and CTAA. 0 and 1 are RFC 4067's, the rest (0x80 and up) ours."""

    OK = 0x00
    BAD_CHECKSUM = 0x01
    FAILED = 0x80
    MALFORMED = 0x81
    NOT_ALLOWED = 0x82
    NO_CONNECTION = 0x83
    NO_CHILD = 0x84
    IKE_SPI_IN_USE = 0x85
    ESP_SPI_IN_USE = 0x86
    VIP_IN_USE = 0x87
    SELECTORS_OVERLAP = 0x88
    ALGORITHM = 0x89
    PROPOSAL = 0x8A
    NO_ADDRESS = 0x8B
    CHARON = 0x8C
    KERNEL = 0x8D
    UNREACHABLE = 0x8E
    PEER_SILENT = 0x8F
    PEER_REFUSED = 0x90
    UNKNOWN_SA = 0x91
    UNKNOWN_TRANSFER = 0x92
    BUSY = 0x93
    STALE_EPOCH = 0x94
    NOT_COVERED = 0x95
    AMBIGUOUS = 0x96
    IN_DOUBT = 0x97
    NO_MOBIKE = 0x98
    IDENTITY = 0x9A
    AUTHENTICATION = 0x9B
    MN_ADDRESS = 0x9C
    VIP_NOT_ALLOWED = 0x9D
    SELECTORS = 0x9E
    MODE = 0x9F
    LIFETIME = 0xA0
    NUMBERS_SPENT = 0xA1
    SPIS = 0xA2
    TOO_MUCH = 0xA3
    PPK = 0xA4
    NOT_ESP = 0xA5
    LOCAL_VIP = 0xA6
    KEY_EXCHANGES = 0xA7
    PER_CPU = 0xA8
    OFFLOADED = 0xA9


UNTOUCHED = frozenset(
    {
        Status.NO_CONNECTION,
        Status.NO_CHILD,
        Status.VIP_IN_USE,
        Status.PROPOSAL,
        Status.NO_MOBIKE,
        Status.IDENTITY,
        Status.AUTHENTICATION,
        Status.MN_ADDRESS,
        Status.VIP_NOT_ALLOWED,
        Status.SELECTORS,
        Status.MODE,
        Status.LIFETIME,
        Status.NUMBERS_SPENT,
        Status.SPIS,
        Status.TOO_MUCH,
        Status.PPK,
        Status.NOT_ESP,
        Status.LOCAL_VIP,
        Status.KEY_EXCHANGES,
    }
)
"""With these a gateway refuses an SA only before it does anything for it. An overlap of selectors may be seen
only when charon has installed the SA, because its marks and if_ids are known then."""

STATUS_TEXT: dict[Status, str] = {
    Status.OK: "fine",
    Status.BAD_CHECKSUM: "the context arrived damaged",
    Status.FAILED: "failed at the other gateway, see its log",
    Status.MALFORMED: "the context could not be parsed",
    Status.NOT_ALLOWED: "the configuration there does not allow it",
    Status.NO_CONNECTION: "the other gateway has no connection of that name",
    Status.NO_CHILD: "the other gateway's connection has no child of that name",
    Status.IKE_SPI_IN_USE: "an IKE SPI is in use there",
    Status.ESP_SPI_IN_USE: "an ESP SPI is in use there",
    Status.VIP_IN_USE: "the virtual IP is in use there",
    Status.SELECTORS_OVERLAP: "the traffic selectors overlap another SA there",
    Status.ALGORITHM: "the kernel or charon there lacks an algorithm",
    Status.PROPOSAL: "the connection there would not accept the SA's algorithms",
    Status.NO_ADDRESS: "the other gateway has no address of the MN's family",
    Status.CHARON: "charon there refused or is not running",
    Status.KERNEL: "the kernel there refused",
    Status.UNREACHABLE: "one gateway could not reach the other",
    Status.PEER_SILENT: "the MN did not answer the other gateway",
    Status.PEER_REFUSED: "the MN refused the other gateway",
    Status.UNKNOWN_SA: "no such SA",
    Status.UNKNOWN_TRANSFER: "the other gateway knows no such transfer",
    Status.BUSY: "an exchange or another transfer is under way",
    Status.STALE_EPOCH: "a newer owner of the SA is known",
    Status.NOT_COVERED: "the SA uses something that cannot be moved",
    Status.AMBIGUOUS: "several SAs answer to that name",
    Status.IN_DOUBT: "the other gateway knows no such transfer, but its charon or kernel has the SA",
    Status.NO_MOBIKE: "the MN does not speak MOBIKE, so it cannot be told another gateway address",
    Status.IDENTITY: "the connection there is for other identities",
    Status.AUTHENTICATION: "the connection there asks for another authentication of the MN",
    Status.MN_ADDRESS: "the MN's outer address or port is none that an MN can have there",
    Status.VIP_NOT_ALLOWED: "the virtual IP is none that may be assigned there",
    Status.SELECTORS: "the connection there does not permit the SA's traffic selectors",
    Status.MODE: "the connection there has another mode (tunnel, transport, BEET)",
    Status.LIFETIME: "the SA lives longer than the connection there permits",
    Status.NUMBERS_SPENT: "the SA has nearly used up its message IDs or sequence numbers",
    Status.SPIS: "the SA's SPIs are reserved or not unique",
    Status.TOO_MUCH: "the SA has more parts than a gateway takes",
    Status.PPK: "the SA was set up with a postquantum preshared key (PPK)",
    Status.NOT_ESP: "the SA has a CHILD_SA that is not ESP",
    Status.LOCAL_VIP: "the gateway itself has a virtual IP in this SA",
    Status.KEY_EXCHANGES: "charon there is too old for the SA's additional key exchanges",
    Status.PER_CPU: "the SA has ESP SAs for single CPUs",
    Status.OFFLOADED: "the SA is left to the network card",
}
