"""What the kernel does with a classic BPF program of ours."""

from __future__ import annotations

from mobike_ext import bpf

_SIZES = {bpf.LD: 4, bpf.LDH: 2, bpf.LDB: 1, bpf.LD_X: 4, bpf.LDH_X: 2, bpf.LDB_X: 1}


def passes(program: list[bpf.Instruction], packet: bytes) -> bool:
    """The packet is let in. A load beyond its end drops it."""
    a, x, at = 0, 0, 0
    while True:
        code, true, false, k = program[at]
        at += 1
        if code in _SIZES:
            start = k + (x if code in (bpf.LD_X, bpf.LDH_X, bpf.LDB_X) else 0)
            if start + _SIZES[code] > len(packet):
                return False
            a = int.from_bytes(packet[start : start + _SIZES[code]])
        elif code == bpf.LDX_MSH:
            x = 4 * (packet[k] & 15)
        elif code == bpf.LDX:
            x = k
        elif code == bpf.ADD:
            a += k
        elif code == bpf.AND:
            a &= k
        elif code == bpf.TAX:
            x = a
        elif code == bpf.TXA:
            a = x
        elif code == bpf.JEQ:
            at += true if a == k else false
        elif code == bpf.JSET:
            at += true if a & k else false
        else:
            assert code == bpf.RET
            return k > 0
