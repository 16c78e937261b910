"""String formats as regular expressions of values that exist: no 30th of February.

Knows no schemas. A format that is not here is an annotation, as the standard has it for names that
it does not define; those that it defines and that no expression holds are in UNENFORCED.
"""

from __future__ import annotations

from typing import Final

_DAY: Final = (
    "(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_YEAR: Final = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_BY_4: Final = "(?:0[48]|[2468][048]|[13579][26])"
_LEAP: Final = f"(?:[0-9]{{2}}{_BY_4}|{_BY_4}00)"  # year 0000 is none, and not in _BY_4
_DATE: Final = f"(?:{_YEAR}-{_DAY}|{_LEAP}-02-29)"
_CLOCK: Final = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME: Final = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:[Zz]|[+-]{_CLOCK})"

_ATEXT: Final = "[0-9A-Za-z!#$%&'*+/=?^_`{|}~-]"
_LOCAL: Final = rf"(?:{_ATEXT}{{1,64}}|{_ATEXT}{{1,15}}(?:\.{_ATEXT}{{1,15}}){{0,3}})"
# No "--", which in third and fourth place only names in other scripts have. Up to 63 characters a
# label and 253 in all: a few long ones, or more that are short.
_LABEL: Final = "[0-9A-Za-z](?:-?[0-9A-Za-z]){0,31}"
_SHORT: Final = "[0-9A-Za-z](?:-?[0-9A-Za-z]){0,9}"


def _labels(least: int) -> str:
    return rf"(?:{_LABEL}(?:\.{_LABEL}){{{least},2}}|{_SHORT}(?:\.{_SHORT}){{{least},11}})"


_HOST: Final = _labels(0)

_BYTE: Final = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4: Final = rf"{_BYTE}(?:\.{_BYTE}){{3}}"
_H16: Final = "[0-9A-Fa-f]{1,4}"


def _ipv6() -> str:
    """RFC 4291: eight groups, of which one run of zeros may be left out,
    the last two perhaps as IPv4."""
    found = [f"(?:{_H16}:){{7}}{_H16}", f"(?:{_H16}:){{6}}{_IPV4}"]
    for before in range(8):
        head = "" if before == 0 else f"{_H16}(?::{_H16}){{{before - 1}}}"
        most = 7 - before
        tails = [f"(?:{_H16}(?::{_H16}){{0,{most - 1}}})?"] if most else [""]
        if most >= 2:
            tails.append(f"(?:{_H16}:){{0,{most - 2}}}{_IPV4}")
        found += [f"{head}::{tail}" for tail in tails]
    return f"(?:{'|'.join(found)})"


_IPV6: Final = _ipv6()
_PERCENT: Final = "%[0-9A-Fa-f]{2}"
_UNRESERVED: Final = "[0-9A-Za-z._~!$&'()*+,;=-]"
_PCHAR: Final = f"(?:{_UNRESERVED}|[:@]|{_PERCENT})"
_PCHAR_NC: Final = f"(?:{_UNRESERVED}|@|{_PERCENT})"
_AUTHORITY: Final = (
    rf"(?:(?:{_UNRESERVED}|:|{_PERCENT})*@)?(?:\[{_IPV6}\]|(?:{_UNRESERVED}|{_PERCENT})*)"
    r"(?::[0-9]{0,4})?"
)
_SEGMENTS: Final = f"(?:/{_PCHAR}*)*"
_ABSOLUTE: Final = f"/(?:{_PCHAR}+{_SEGMENTS})?"
_TAIL: Final = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_SCHEME: Final = "[A-Za-z][0-9A-Za-z+.-]*"
_URI: Final = f"{_SCHEME}:(?://{_AUTHORITY}{_SEGMENTS}|{_ABSOLUTE}|{_PCHAR}+{_SEGMENTS}|){_TAIL}"
_RELATIVE: Final = f"(?://{_AUTHORITY}{_SEGMENTS}|{_ABSOLUTE}|{_PCHAR_NC}+{_SEGMENTS}|){_TAIL}"
_POINTER: Final = "(?:/(?:[^/~]|~[01])*)*"

_T: Final = (
    "T(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S)"
)
_D: Final = (
    "(?:[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D)"
)

_OWN: Final = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": f"P(?:[0-9]{{1,9}}W|{_D}(?:{_T})?|{_T})",
    "email": f"{_LOCAL}@{_labels(1)}",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": _URI,
    "uri-reference": f"(?:{_URI}|{_RELATIVE})",
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]{{0,8}})(?:#|{_POINTER})",
}
# what is of the narrower format is of the wider one too
FORMATS: Final = _OWN | {
    "idn-email": _OWN["email"],
    "idn-hostname": _OWN["hostname"],
    "ip-address": _OWN["ipv4"],
    "host-name": _OWN["hostname"],
    "iri": _OWN["uri"],
    "iri-reference": _OWN["uri-reference"],
    "uri-template": _OWN["uri-reference"],
}
UNENFORCED: Final = frozenset(("regex", "color"))
