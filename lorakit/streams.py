"""Standard streams of any encoding: what a code page lacks is written in ASCII."""

import codecs
import io
import sys

_ASCII = {
    **{"→": "->", "×": "x", "·": ".", "…": "...", "–": "-", "−": "-", "≥": ">=", "≤": "<=", "≈": "~", "√": "sqrt "},
    **{"█": "#", "━": "-", "╸": "-", "╺": "-", "²": "^2", "³": "^3", "‘": "'", "’": "'", "“": '"', "”": '"'},
}
"""lorakit's own signs, for code pages that lack them."""


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    shown = (_ASCII.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in lacking)
    return "".join(shown), error.end


def write_everywhere() -> None:
    """Have stdout and stderr write anything, and stdin read anything, whatever their encoding; once a process."""
    codecs.register_error("lorakit", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lorakit")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
