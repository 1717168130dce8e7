"""Likely personal data in a text: e-mail addresses, telephone and payment-card numbers, IBANs, public IPv4 addresses.

A finding is a hint for a person who then looks, so a false alarm costs more than a miss: checksums where a number has one, and
for a telephone number a word before it, a country code, or the grouping of a number that is written to be dialled.
Not looked for: names, postal addresses, IPv6 addresses, national identity numbers, digits that are not 0 to 9.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

# Seven digits and more with little between them: the one pass over every text. What they are is asked after, and rarely.
_RUN = re.compile(r"[0-9](?:[ \u00a0().\-/]{0,3}[0-9]){6,}")
_LOCAL = re.compile(r"(?<![A-Za-z0-9_.%+@/-])[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*\Z")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+([A-Za-z]{2,24})(?![A-Za-z0-9_-])")
_FILES = frozenset(
    ["css", "gif", "html", "jpeg", "jpg", "js", "json", "md", "pdf", "png", "py", "svg", "txt", "webp", "yaml", "yml"]
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})[0-9]{2}")
_IBAN_LENGTHS = {  # SWIFT's registry
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA", 30: "JO KW MU YE", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip
_APART = r"(?<![\w+/])(?<![0-9][.,\-])"  # no part of a longer number, of a word or of a path
_END = r"(?!\w|[.,\-/][0-9])"
_CARD = re.compile(
    rf"{_APART}(?:[0-9]{{4}}([ -])[0-9]{{4}}\1[0-9]{{4}}\1[0-9]{{4}}|3[47][0-9]{{2}}([ -])[0-9]{{6}}\2[0-9]{{5}}"
    rf"|[0-9]{{14,19}}){_END}"
)
# Visa, Mastercard (two ranges), American Express, Diners, Discover, JCB, UnionPay: an issuer's first digits and the lengths.
_ISSUER = re.compile(
    r"4[0-9]{15}|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}|3[47][0-9]{13}"
    r"|3(?:0[0-5]|[68][0-9])[0-9]{11}|6(?:011|4[4-9][0-9]|5[0-9]{2})[0-9]{12}|35(?:2[89]|[3-8][0-9])[0-9]{12}|62[0-9]{14,17}"
)
_IPV4 = re.compile(rf"{_APART}(?<!\.)(?:[0-9]{{1,3}}\.){{3}}[0-9]{{1,3}}{_END}")
# Of less than nine digits it may be a version or a section: it is an address where a word, a port or a network says so.
_DOTTED = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_SAID_IPV4 = re.compile(
    rf"(?:(?<=://)|{_APART})(?<!\.)(?:[0-9]{{1,3}}\.){{3}}[0-9]{{1,3}}"
    r"(?P<after>:[0-9]{2,5}(?![0-9.])|/[0-9]{1,2}(?![0-9./]))?(?![\w\-]|[.,][0-9])"
)
_ADDRESSED = re.compile(
    r"(?:\b(?:ip|ipv4|address(?:es)?|hosts?|servers?|ping|ssh|dns|gateway|router|client|nameserver|peer)\b[^\n]{0,24}|@|://)\Z",
    re.I,
)
_VERSION = re.compile(r"(?:\bv|version|\bver\.?|release|build)\s*[:=]?\s*\Z", re.I)

_FIRST = rf"{_APART}(?<![0-9] )(?<![0-9] \()"
# Written to be dialled. A plain run of digits never is: it may be an order, a bar code, a time stamp.
_DIALLED = re.compile(
    rf"{_FIRST}(?:1[-. ])?(?:"
    r"\([2-9][0-9]{2}\)[ -]?[0-9]{3}[-. ][0-9]{4}"  # (212) 555-0123
    r"|[2-9][0-9]{2}-[0-9]{3}-[0-9]{4}"  # 212-555-0123
    r"|[2-9][0-9]{2}\.[2-9][0-9]{2}\.[0-9]{4}"  # 212.555.0123
    rf"){_END}(?! [0-9])"
    rf"|{_FIRST}(?:"
    r"\(0[1-9][0-9]{0,3}\)[ -]?[0-9]{3,4}[ -]?[0-9]{3,4}"  # (03) 8736 3799
    r"|0[1-9][0-9]{0,3}-[0-9]{3,4}[ -]?[0-9]{3,4}"  # 03-8736 3799
    r"|0[1-9][0-9]{1,3} [0-9]{3,4} [0-9]{3,4}"  # 020 7946 0958
    r"|0[1-9](?: [0-9]{2}){4}"  # 01 42 68 53 00
    r"|0[1-9][0-9]{1,3}[/ -][0-9]{6,8}"  # 030/12345678, 07911 123456
    r"|0[1-9][0-9]{0,2}[- ][0-9]{3,4}[- ][0-9]{4}"  # 03-1234-5678, 090-1234-5678
    r"|\([1-9][0-9]\) ?9?[0-9]{4}-[0-9]{4}"  # (11) 91234-5678
    rf"){_END}(?! [0-9])"
)
_ABROAD = re.compile(rf"(?<![\w+])\+\(?([1-9](?:[ \u00a0().\-/]{{0,3}}[0-9]){{7,14}}){_END}")
_CODES = re.compile(
    r"1[2-9][0-9]{2}[0-9]{7}\Z|7[0-9]{10}\Z|(?:2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58])[0-9]{7,12}\Z"
    r"|(?:2[1-689][0-9]|35[0-9]|37[0-9]|38[0-9]|42[0-9]|50[0-9]|59[0-9]|67[0-9]|68[0-9]|69[0-2]|85[0-9]|88[0-9]|96[0-9]"
    r"|97[0-9]|99[0-9])[0-9]{6,11}\Z"
)  # E.164's country codes, and the length of what follows
_NAMED = re.compile(
    r"(?:\b|_)(?:(?:tele?(?:phone)?|phone|mobile|fax|whatsapps?|hotline|h/p)(?:[\s.]*(?:no|number|num|is)\b)*"
    r"|(?:cell|contact)\s*(?:phone|no|number))[\s.:#=()\-]*\Z",
    re.I,
)
_NUMBER = re.compile(r"[0-9](?:[ \u00a0().\-]{0,3}[0-9]){6,14}(?!\w)")
_DATE = re.compile(
    r"[0-9]{1,2}([./-])[0-9]{1,2}\1(?:[0-9]{4}|[0-9]{2})(?![0-9])|[0-9]{4}([./-])[0-9]{1,2}\2[0-9]{1,2}(?![0-9])"
)


@dataclass(frozen=True)
class Finding:
    """What seems to be personal data: text[start:stop]. Kinds: email, phone, card, iban, ip."""

    kind: str
    start: int
    stop: int


def find_personal(text: str) -> list[Finding]:
    """Likely personal data in the order of the text; findings do not overlap."""
    dotted = text.count(".") > 2 and _DOTTED.search(text) is not None
    if "@" not in text and not dotted and not _RUN.search(text):  # most texts; twice as fast for short ones
        return []
    found = [*_emails(text), *(_said_addresses(text) if dotted else ())]
    for run in _RUN.finditer(text):
        for finder in (_ibans, _cards, _addresses, _phones):  # by how sure it is: what is one thing is not the next
            for finding in finder(text, run.start(), run.end()):
                if not any(f.start < finding.stop and finding.start < f.stop for f in found[-8:]):
                    found.append(finding)
    return sorted(found, key=lambda f: f.start)


def masked(text: str, finding: Finding) -> str:
    """The finding so that a person can recognise it and nobody can use it: "j…@e….com", "…42"; never whole."""
    value = text[finding.start : finding.stop]
    if finding.kind != "email":
        return f"…{value[-2:]}"
    local, _, domain = value.partition("@")
    name, _, top = domain.rpartition(".")
    return f"{_initial(local)}…@{_initial(name)}….{top}"


def _initial(part: str) -> str:
    return part[0] if len(part) > 2 else ""


def _emails(text: str) -> Iterator[Finding]:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        if domain is not None and domain[1].lower() not in _FILES:
            local = _LOCAL.search(text[max(0, at - 65) : at])
            # git@host:path is an address of a repository; a local part has 64 characters at most
            if (
                local is not None
                and len(local[0]) <= 64
                and not (local[0] == "git" and text[domain.end() :][:1] == ":")
            ):
                yield Finding("email", at - len(local[0]), domain.end())
        at = text.find("@", at + 1)


def _ibans(text: str, start: int, stop: int) -> Iterator[Finding]:
    for match in _IBAN.finditer(text, max(0, start - 12), stop):
        at, characters = match.start(), ""
        length = _IBAN_LENGTHS.get(match[1], 0)
        while len(characters) < length and at < len(text):
            if text[at] in " \u00a0" and text[at - 1] not in " \u00a0":
                at += 1
                continue
            if not (text[at].isascii() and (text[at].isdigit() or text[at].isupper())):
                break
            characters += text[at]
            at += 1
        if length == len(characters) and not text[at : at + 1].isalnum():
            turned = "".join(str(int(c, 36)) for c in characters[4:] + characters[:4])
            if int(turned) % 97 == 1:  # ISO 7064, mod 97-10
                yield Finding("iban", match.start(), at)


def _cards(text: str, start: int, stop: int) -> Iterator[Finding]:
    for match in _CARD.finditer(text, start, min(len(text), stop + 2)):
        digits = re.sub(r"[ -]", "", match[0])
        if _ISSUER.fullmatch(digits) and _luhn(digits):
            yield Finding("card", match.start(), match.end())


def _luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812: every second digit from the right doubled, the digits of all summed."""
    doubled = sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (doubled + sum(int(d) for d in digits[-1::-2])) % 10 == 0


def _addresses(text: str, start: int, stop: int) -> Iterator[Finding]:
    for match in _IPV4.finditer(text, start, min(len(text), stop + 2)):
        octets = match[0].split(".")
        # Nine digits of at most twelve: nearly all addresses have them, versions and sections hardly ever.
        if sum(map(len, octets)) < 9 or any(int(o) > 255 or (o[0] == "0" and o != "0") for o in octets):
            continue
        address = ipaddress.IPv4Address(match[0])
        before = text[max(0, match.start() - 12) : match.start()]
        if address.is_global and not address.is_multicast and not _VERSION.search(before):
            yield Finding("ip", match.start(), match.end())


def _said_addresses(text: str) -> Iterator[Finding]:
    for match in _SAID_IPV4.finditer(text):
        octets = match[0].removesuffix(match["after"] or "").split(".")
        if any(int(o) > 255 or (o[0] == "0" and o != "0") for o in octets):
            continue
        address = ipaddress.IPv4Address(".".join(octets))
        before = text[max(0, match.start() - 40) : match.start()]
        said = match["after"] or _ADDRESSED.search(before)
        if said and address.is_global and not address.is_multicast and not _VERSION.search(before):
            yield Finding("ip", match.start(), match.start() + len(".".join(octets)))


def _phones(text: str, start: int, stop: int) -> Iterator[Finding]:
    end = min(len(text), stop + 2)
    named = _NAMED.search(text[max(0, start - 30) : start])
    if named and not _DATE.match(text, start):
        number = _NUMBER.match(text, start, end)
        if number:
            opened = text[start - 1 : start] == "(" and ")" in number[0]
            yield Finding("phone", start - opened, number.end())
            return
    for match in _ABROAD.finditer(text, max(0, start - 3), end):
        between = re.sub(r"[0-9]", "", match[1])
        if between != "." and _CODES.match(re.sub(r"[^0-9]", "", match[1])):
            yield Finding("phone", match.start(), match.end())
            return
    for match in _DIALLED.finditer(text, max(0, start - 1), end):
        digits = re.sub(r"[^0-9]", "", match[0])
        counted = [int(part) for part in match[0].split(" ")] if match[0].count(" ") == 4 else []
        steps = {b - a for a, b in pairwise(counted)}
        if 9 <= len(digits) <= 11 and len(steps) != 1:  # 01 02 03 04 05 is a count
            yield Finding("phone", match.start(), match.end())
