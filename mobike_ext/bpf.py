"""Classic BPF as sockets use it: opcodes, an assembler with labels, and attaching a program.

Source: Linux packet filter (linux/filter.h, Documentation/networking/filter.rst), socket(7).
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Sequence
from itertools import chain

_SO_ATTACH_FILTER = 26

LD, LDH, LDB, LD_X, LDH_X, LDB_X = 0x20, 0x28, 0x30, 0x40, 0x48, 0x50
"""Load a word, half word, octet at the operand, or at X and the operand."""
LDX, LDX_MSH, ADD, AND, TAX, TXA = 0x01, 0xB1, 0x04, 0x54, 0x07, 0x87
JEQ, JSET, RET = 0x15, 0x45, 0x06

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand (struct sock_filter)."""

Line = tuple[int, int] | tuple[int, int, str, str] | str
"""An instruction (code, operand), a jump (code, operand, label if true, if false; "": the next), a label."""


def assemble(lines: Sequence[Line]) -> list[Instruction]:
    """The program for `attach`. A jump goes forwards, over 255 instructions at the most."""
    places: dict[str, int] = {}
    at = 0
    for line in lines:
        if isinstance(line, str):
            places[line] = at
        else:
            at += 1
    program: list[Instruction] = []
    for line in lines:
        if isinstance(line, str):
            continue
        jumps = [places[label] - len(program) - 1 if label else 0 for label in line[2:]] or [0, 0]
        program.append((line[0], jumps[0], jumps[1], line[1]))
    return program


def attach(raw: socket.socket, program: list[Instruction]) -> None:
    """Let only packets that pass `program` into the socket. Errors: OSError."""
    code = struct.pack("=" + "HBBI" * len(program), *chain.from_iterable(program))
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)
