"""The engine of a gateway: who may own an SA, and what has to be done for that. No I/O.

`core.Engine` is a plain object: messages, requests, outcomes and the time go in, and what has to be done
comes out (`outputs`). It asks no clock, draws no random octets and opens no connection. Whoever drives it
(`ikectx.driver`; a test in memory) carries out what comes out and reports how that ended.
"""
