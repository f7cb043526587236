"""Instructions whose answer is a list of places: the countries of Africa, and the capitals of Europe north of 45°."""

from __future__ import annotations

import re
import unicodedata

from rlmono.rewards.ifbench.text import lines

_NAMES = """
    algeria,angola,benin,botswana,burkina faso,burundi,cameroon,central african republic,chad,comoros,djibouti,egypt,equatorial guinea,eritrea,
    eswatini/swaziland,ethiopia,gabon,ghana,guinea,guinea bissau,kenya,lesotho,liberia,libya,madagascar,malawi,mali,mauritania,mauritius,morocco,
    mozambique,namibia,niger,nigeria,rwanda,senegal,seychelles,sierra leone,somalia,south africa,south sudan,sudan,tanzania,togo,tunisia,uganda,
    zambia,zimbabwe,cabo verde/cape verde,cote divoire/ivory coast,gambia/the gambia/gambia the,sao tome and principe,
    congo/republic of the congo/congo republic of the/congo republic/congo brazzaville/republic of congo,
    democratic republic of the congo/congo democratic republic of the/democratic republic of congo/dr congo/drc/congo kinshasa
"""
_AFRICA = {name.strip(): row for row in _NAMES.split(",") for name in row.split("/")}
"""The members of the United Nations there, by each name that they go by -> all names of one."""
_DISPUTED = frozenset(("western sahara", "sahrawi arab democratic republic", "somaliland"))
_NORTHERN_CAPITALS = [part.strip() for part in """
    reykjavik,helsinki,oslo,tallinn,stockholm,riga,moscow,copenhagen,vilnius,minsk,dublin,berlin,amsterdam,warsaw,london,brussels,kyiv,prague,
    luxembourg,paris,vienna,bratislava,budapest,vaduz,chisinau,bern,ljubljana,zagreb
""".replace("\n", "").split(",")]
_OTHER_NAMES = {"kiev": "kyiv", "luxembourg city": "luxembourg", "berne": "bern", "kishinev": "chisinau"}


def reverse_newline(response: str) -> bool:
    """All countries of Africa, each on a line of its own and once, from Z to A as they are written."""
    names = [_plain(re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", line)) for line in lines(response)]
    countries = [_AFRICA.get(name, "") for name in names if name not in _DISPUTED]
    return names == sorted(names, reverse=True) and sorted(countries) == sorted(set(_AFRICA.values()))


def european_capitals_sort(response: str) -> bool:
    """The capitals of Europe north of 45° from north to south, separated by commas. Kyiv, which the benchmark's own list lacks, may be there."""
    names = [_OTHER_NAMES.get(name, name) for name in map(_plain, response.strip().rstrip(".").split(","))]
    return names in (_NORTHERN_CAPITALS, [name for name in _NORTHERN_CAPITALS if name != "kyiv"])


def _plain(text: str) -> str:
    """A name in small letters, without accents and punctuation."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return " ".join(re.sub(r"[^a-z ]", "", letters.replace("-", " ")).split())
