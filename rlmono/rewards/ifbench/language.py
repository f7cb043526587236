"""The language of a text, told by its letters and its commonest words: enough to see whether an instruction was followed."""

from __future__ import annotations

import re
from collections import Counter

_SCRIPTS: dict[str, tuple[str, ...]] = {
    r"\u3040-\u30ff": ("ja",), r"\u4e00-\u9fff": ("zh",), r"\uac00-\ud7af": ("ko",), r"\u0e00-\u0e7f": ("th",), r"\u0590-\u05ff": ("he",),
    r"\u0370-\u03ff": ("el",), r"\u0980-\u09ff": ("bn",), r"\u0a00-\u0a7f": ("pa",), r"\u0a80-\u0aff": ("gu",), r"\u0b80-\u0bff": ("ta",),
    r"\u0c00-\u0c7f": ("te",), r"\u0c80-\u0cff": ("kn",), r"\u0d00-\u0d7f": ("ml",), r"\u0600-\u06ff": ("ar", "fa", "ur"),
    r"\u0900-\u097f": ("hi", "mr", "ne"), r"\u0400-\u04ff": ("ru", "bg", "uk"), r"A-Za-z\u00c0-\u024f\u1e00-\u1eff": (),
}
"""Letters -> the languages that are written with them; of the last, those of `_WORDS` that no other letters have."""
_WORDS: dict[str, str] = {
    "en": "the and of to in is that it for was with as on be are this you not have from by or at but they his her an we can",
    "de": "der die und das ist nicht ein eine zu den mit von auf für sich dem im auch es wird sind ich wie bei aus oder werden",
    "fr": "le la les des et est une dans que pour qui pas sur par plus avec ce il au sont nous vous elle cette mais être",
    "es": "el los las y es una que por con para del se no como más su lo pero este muy también son está hay fue",
    "pt": "o os as e é um uma que por com para não do da em se como mais dos das mas também são foi ao você isso",
    "it": "il gli di che è una per con non del della si sono da nel più anche come ma questo alla dei un le lo",
    "nl": "de het een en van is dat niet in op te zijn voor met aan er maar ook door die wordt bij naar hebben",
    "sv": "och att det är en som på för av med till den inte har om ett jag vi kan de från eller var så",
    "fi": "ja on ei se että oli hän mutta ovat kun myös tai niin joka sen kuin voi olla tämä ole jos mitä",
    "pl": "i w na nie się jest z że do to o jak ale po co są tak być dla od przez tym jego może oraz",
    "vi": "và của là có không được cho một người trong những các đã với này khi để đến từ cũng như tôi bạn",
    "sw": "na ya wa kwa ni katika la za cha kuwa hii yake kama pia lakini au watu wao ambayo hiyo huu si",
    "tr": "ve bir bu için ile de da çok olarak daha gibi ne ama var değil olan en kadar sonra o mi",
    "id": "yang dan di untuk dengan ini itu dari tidak pada adalah dalam akan ke juga saya oleh atau bisa ada",
    "ru": "и в не на что он как это с по но из у за от для бы его она так было они все мы",
    "bg": "и на да се в от за не че са е по с като това но което или ще към си има той",
    "uk": "і в не на що з до це як він та є у за від для але його про вона так було ми й",
    "ar": "في من على أن إلى هذا هذه التي الذي ما لا كان عن مع أو هو هي كل بين بعد ذلك قد",
    "fa": "و در به از که این را با است برای آن یک می خود تا کرد بر هم نیز شده بود ما های اما",
    "ur": "کے میں کی ہے اور سے کا کو اس نے پر کہ یہ ہیں ایک نہیں بھی تو ہو گیا تھا وہ جو",
    "hi": "के में है की और से का को पर यह कि एक नहीं हैं भी इस तो ने हो था वह लिए जो",
    "mr": "आहे आणि या व च्या तो हे ते मध्ये होते नाही साठी एक त्या आहेत की केले असे ही होता पण तर",
    "ne": "र छ को मा यो हो लाई पनि गर्न छन् एक भएको यस गरेको थियो हुन् तर भने गर्ने छैन",
}
LANGUAGES = frozenset({*_WORDS, *(name for names in _SCRIPTS.values() for name in names)})
_VOCABULARY = {name: frozenset(listed.split()) for name, listed in _WORDS.items()}
_ELSEWHERE = {name for names in _SCRIPTS.values() for name in names}


def language_of(text: str) -> str | None:
    """The ISO 639-1 code; None for a text without letters, or without a word that tells languages of one script apart."""
    counts = {script: len(re.findall(f"[{script}]", text)) for script in _SCRIPTS}
    script = max(counts, key=counts.__getitem__)
    if not counts[script]:
        return None
    if counts[r"\u3040-\u30ff"] * 10 > counts[r"\u4e00-\u9fff"] and script == r"\u4e00-\u9fff":
        return "ja"         # it has Chinese characters too, and often more of them
    names = _SCRIPTS[script] or tuple(name for name in _WORDS if name not in _ELSEWHERE)
    if len(names) == 1:
        return names[0]
    found = Counter(re.findall(r"[^\W\d_]+(?:[\u0300-\u036f\u0900-\u097f]+[^\W\d_]*)*", text.lower()))
    scores = {name: sum(found[word] for word in _VOCABULARY[name]) for name in names}
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] else None
