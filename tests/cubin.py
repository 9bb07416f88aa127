"""What a cubin says of its kernels: an ELF file whose `.nv.info` lists, for each, the bytes of stack that a thread has."""

import struct

FRAME_SIZE = 0x11
SIZED = 0x04
"""An attribute with a size of its own, as `FRAME_SIZE` is."""
SYMBOLS, STRINGS = ".symtab", ".strtab"


def sections(cubin):
    """The sections by name."""
    assert cubin[:4] == b"\x7fELF", "a cubin is an ELF file"
    (at,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, at + size * i) for i in range(count)]
    _, _, _, _, base, _ = headers[names]
    return {text(cubin, base + name): cubin[offset : offset + nbytes] for name, _, _, _, offset, nbytes in headers if nbytes}


def text(data, at):
    return data[at : data.index(b"\0", at)].decode()


def frames(cubin):
    """Bytes of stack per thread by kernel: what does not fit in registers, or is indexed at run time."""
    parts = sections(cubin)
    names = [text(parts[STRINGS], struct.unpack_from("<I", parts[SYMBOLS], at)[0]) for at in range(0, len(parts[SYMBOLS]), 24)]
    info, found, at = parts[".nv.info"], {}, 0
    while at < len(info):
        kind, attribute, size = struct.unpack_from("<BBH", info, at)
        if kind == SIZED and attribute == FRAME_SIZE:
            symbol, nbytes = struct.unpack_from("<II", info, at + 4)
            found[names[symbol]] = nbytes
        at += 4 + (size if kind == SIZED else 0)
    return found
