"""Findings as one text to paste into an issue, with what is nobody's business left out. No torch."""

import datetime
import getpass
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from lorakit import __version__
from lorakit.core.doctor.finding import Finding
from lorakit.core.environment import secrets


def report_text(findings: Mapping[str, Finding]) -> str:
    """All findings, line by line, cleaned."""
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    lines = [f"lorakit {__version__} doctor, {day}", ""]
    for name, found in findings.items():
        lines.append(f"{found.status:<4}  {name:<12}  {found.detail}")
        lines += [f"      fix: {found.fix}"] if found.fix and found.status in ("warn", "fail") else []
    return cleaned("\n".join(lines))


def cleaned(text: str) -> str:
    """A text without tokens and passwords, home folders, user and host names, and addresses of this network."""
    for secret in sorted(secrets(), key=len, reverse=True):
        text = text.replace(secret, "<secret>")
    text = re.sub(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[a-z]-)[\w-]{8,}", "<secret>", text)
    text = re.sub(r"(?<=://)[^\s/@]+@", "<secret>@", text)  # user:password before a host
    home = str(Path.home())
    if home not in ("/", ""):
        text = text.replace(home, "~")
    text = re.sub(r"(/home|/Users|[A-Za-z]:\\Users)[/\\][^\s/\\:;,\"')]+", "~", text)
    names = {socket.gethostname(), socket.gethostname().partition(".")[0]} - {"", "localhost"}
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "<host>", text)
    user = _user()
    if len(user) > 2 and user != "root":
        text = re.sub(rf"(?<![\w-]){re.escape(user)}(?![\w-])", "<user>", text)
    return re.sub(r"\b(?!127\.0\.0\.1\b|0\.0\.0\.0\b)(?:\d{1,3}\.){3}\d{1,3}\b(?!\.\d)", "<address>", text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""
