"""What a file is, by its first bytes: a compression, a known format that is not text, or text.

A file's name decides nothing here. Signatures are those of each format's specification.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

HEAD_BYTES = 1 << 16
"""The bytes that decide. Formats need at most the first 512; the rest is for the share of control characters."""
PARQUET = "parquet"
LONGEST_HEADER = 100 << 20
"""Bytes of a safetensors header, the format's own limit."""
CONTROL_SHARE = 0.03
"""A file with a larger share of control characters, and with a NUL or with bytes that are not UTF-8, is binary. Random
bytes have a share of 0.10, text in any encoding has almost none."""

_SIGNATURES = (
    # archives, and compressions that are not read
    (b"PK\x03\x04", "a zip archive (or a document, a .npz or a model made of one)"),
    (b"PK\x05\x06", "a zip archive"),
    (b"PK\x07\x08", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"!<arch>\n", "an ar archive"),
    (b"!<thin>\n", "an ar archive"),
    (b"MSCF\0\0\0\0", "a cab archive"),
    (b"xar!\0", "a xar archive"),
    (b"\xed\xab\xee\xdb", "an rpm package"),
    (b"\xc7\x71", "a cpio archive", True),
    (b"hsqs", "a squashfs image", True),
    (b"\x1f\x9d", "compressed by compress (.Z)"),
    (b"\x1f\xa0", "compressed by compress (.Z)"),
    (b"LZIP", "compressed by lzip", True),
    (b"\x89LZO\0\r\n", "compressed by lzop"),
    (b"\xff\x06\0\0sNaPpY", "compressed by snappy"),
    # images
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image", True),
    (b"GIF89a", "a GIF image", True),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"\0\0\1\0", "an icon"),
    (b"8BPS\0", "a Photoshop image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\xff\x0a", "a JPEG XL image", True),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"v/1\x01", "an OpenEXR image"),
    (b"SIMPLE  =                    T", "a FITS file"),
    # audio and video
    (b"ID3", "an MP3 recording", True),
    (b"\xff\xfb", "an MP3 recording", True),
    (b"\xff\xf3", "an MP3 recording", True),
    (b"\xff\xf2", "an MP3 recording", True),
    (b"\xff\xf1", "an AAC recording", True),
    (b"\xff\xf9", "an AAC recording", True),
    (b"OggS\0", "an Ogg recording"),
    (b"fLaC", "a FLAC recording", True),
    (b"FORM", "an AIFF recording", True),
    (b"MThd\0", "a MIDI file"),
    (b"#!AMR", "an AMR recording", True),
    (b".snd\0", "an AU recording"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"FLV\x01", "a Flash video"),
    (b"\0\0\1\xba", "an MPEG video"),
    (b"\0\0\1\xb3", "an MPEG video"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file"),
    # documents and fonts
    (b"%PDF-", "a PDF document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (b"AT&TFORM", "a DjVu document", True),
    (b"ITSF\x03", "a CHM document"),
    (b"wOFF", "a font", True),
    (b"wOF2", "a font", True),
    (b"OTTO\0", "a font"),
    (b"\0\1\0\0\0", "a font or a database"),
    (b"ttcf\0", "a font"),
    # programs
    (b"\x7fELF", "an executable"),
    (b"MZ", "an executable", True),
    (b"\xca\xfe\xba\xbe", "an executable or a Java class"),
    (b"\xcf\xfa\xed\xfe", "an executable"),
    (b"\xce\xfa\xed\xfe", "an executable"),
    (b"\xfe\xed\xfa\xcf", "an executable"),
    (b"\xfe\xed\xfa\xce", "an executable"),
    (b"\0asm", "a WebAssembly program"),
    (b"BC\xc0\xde", "LLVM bitcode"),
    (b"\x1bLua", "Lua bytecode"),
    (b"dex\n0", "an Android program", True),
    # tables, arrays, models, databases
    (b"PAR1", PARQUET),
    (b"PARE", "an encrypted parquet file", True),
    (b"ARROW1\0\0", "an Arrow (Feather) file"),
    (b"\xff\xff\xff\xff", "an Arrow stream, or binary data", True),
    (b"FEA1", "a Feather file", True),
    (b"ORC", "an ORC file", True),
    (b"Obj\x01", "an Avro file"),
    (b"\x93NUMPY", "a numpy array"),
    (b"GGUF", "a GGUF model", True),
    (b"GGML", "a GGML model", True),
    (b"ggjt", "a GGML model", True),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"CDF\x01", "a NetCDF file"),
    (b"CDF\x02", "a NetCDF file"),
    (b"MATLAB 5.0 MAT-file", "a MATLAB file"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"PACK\0\0\0", "a git pack"),
    (b"DIRC\0\0\0", "a git index"),
    (b"\xfftOc", "a git index"),
    (b"bplist0", "a property list", True),
    (b"\x00\x00\x00\x01Bud1", "a folder's .DS_Store"),
    # pointers to a content that is elsewhere
    (b"version https://git-lfs.github.com/spec/", "a git-LFS pointer, not its content: run `git lfs pull`"),
    (b"version https://hawser.github.com/spec/", "a git-LFS pointer, not its content: run `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer, not its content: run `git annex get`"),
)
"""First bytes, the name, and True if the first bytes could begin a text: then the head must hold control characters."""

_ENCODINGS = (  # UTF-32 before UTF-16: its mark begins with that of UTF-16
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_CONTROL = bytes({*range(1, 8), *range(14, 27), *range(28, 32), 127})
"""Control characters that no text needs: all but tabs, line and page ends, backspace, escape and NUL."""
_PICKLES = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def compression_of(head: bytes) -> str | None:
    """gzip, zstd, xz, lzma, bzip2 or lz4 if `head` begins a file of this compression."""
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:6] == b"\xfd7zXZ\0":
        return "xz"
    if head[:3] == b"BZh" and head[3:4] in b"123456789" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bzip2"
    if head[:4] in (b"\x04\x22\x4d\x18", b"\x02\x21\x4c\x18"):
        return "lz4"
    if head[:4] == b"\x28\xb5\x2f\xfd" or (0x50 <= (head or b"\0")[0] < 0x60 and head[1:4] == b"\x2a\x4d\x18"):
        return "zstd"  # or a skippable frame, with which zstd files of several frames may begin
    if head[:1] == b"\x5d" and len(head) >= 13 and _is_lzma_header(head):
        return "lzma"
    return None


def _is_lzma_header(head: bytes) -> bool:
    """A dictionary size of the form 2^n or 3*2^n, and a size that is unknown or below 256 GB, as `file` and xz test."""
    dictionary, size = struct.unpack("<IQ", head[1:13])
    power = any(part & (part - 1) == 0 for part in (dictionary, dictionary // 3 if dictionary % 3 == 0 else 3))
    return bool(dictionary >= 4096 and power and (size == 2**64 - 1 or size < 1 << 38))


def not_text(head: bytes) -> str | None:
    """What a file with these first bytes is, with an article; `parquet`; or None for text in an ASCII-based encoding.

    head: up to HEAD_BYTES from the beginning of the decompressed content.
    """
    compression = compression_of(head)
    if compression is not None:
        return f"compressed by {compression} a second time"
    for begin, name, *ambiguous in _SIGNATURES:
        if head.startswith(begin) and (not ambiguous or _controls(head)):
            return name
    for begin, name in _ENCODINGS:
        if head.startswith(begin):
            return _encoded(name)
    return next((name for name, test in _TESTS if test(head)), None)


def _encoded(name: str) -> str:
    return f"{name} text; convert it: iconv -f {name} -t UTF-8"


def _is_tar(head: bytes) -> bool:
    """The checksum of the first header is right; old archives have no other sign."""
    if len(head) < 512:
        return False
    try:
        stored = int(head[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return stored == sum(head[:148]) + 8 * 32 + sum(head[156:512]) and stored > 8 * 32


def _is_cpio(head: bytes) -> bool:
    return re.match(rb"07070[12][0-9A-Fa-f]{104}|070707[0-7]{70}", head) is not None


def _is_bmp(head: bytes) -> bool:
    return head[:2] == b"BM" and head[6:10] == bytes(4)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= LONGEST_HEADER


def _is_pickle(head: bytes) -> bool:
    return head[:2] in _PICKLES


def _is_python_bytecode(head: bytes) -> bool:
    return head[2:4] == b"\r\n" and b"\0" in head[4:16]


def _is_riff(head: bytes) -> bool:
    return head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:12] in (b"WAVE", b"WEBP", b"AVI ", b"ACON", b"RMID")


def _is_mp4(head: bytes) -> bool:
    return head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") and head[:1] == b"\0"


def _is_utf16(head: bytes) -> bool:
    """UTF-16 without a mark: most bytes at the even or the odd places are NUL, and few at the other ones."""
    even, odd = head[0::2], head[1::2]
    few, many = sorted((even.count(0) / max(1, len(even)), odd.count(0) / max(1, len(odd))))
    return len(head) >= 8 and many > 0.6 and few < 0.1


def _is_utf32(head: bytes) -> bool:
    shares = [head[at::4].count(0) / max(1, len(head[at::4])) for at in range(4)]
    return len(head) >= 16 and (min(shares[2:]) > 0.95 or min(shares[:2]) > 0.95) and min(shares) < 0.5


def _is_utf8(head: bytes) -> bool:
    """Whether the bytes are UTF-8, the last character possibly cut."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return error.end == len(head) and len(head) - error.start < 4 and "unexpected end" in error.reason
    return True


def _controls(head: bytes) -> int:
    return len(head) - len(head.translate(None, _CONTROL))


def _is_unknown_binary(head: bytes) -> bool:
    return _controls(head) > CONTROL_SHARE * len(head) and (b"\0" in head or not _is_utf8(head))


_TESTS: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("a tar archive", _is_tar),
    ("a cpio archive", _is_cpio),
    ("a BMP image", _is_bmp),
    ("a safetensors model", _is_safetensors),
    ("a Python pickle", _is_pickle),
    ("Python bytecode", _is_python_bytecode),
    ("an audio, video or WebP file", _is_riff),
    ("an MP4 video or HEIF image", _is_mp4),
    (_encoded("UTF-32"), _is_utf32),
    (_encoded("UTF-16"), _is_utf16),
    ("binary data (of no known format)", _is_unknown_binary),
)
