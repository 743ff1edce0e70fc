"""
Aya Expanse's 23 languages, Chinese in both scripts: codes, names, families, scripts, clusters, and other people's codes.
"""

# code -> (English name, family)
LANGUAGES = {
    "ar": ("Arabic", "Semitic"), "cs": ("Czech", "Slavic"), "de": ("German", "Germanic"), "el": ("Greek", "Hellenic"),
    "en": ("English", "Germanic"), "es": ("Spanish", "Romance"), "fa": ("Persian", "Iranian"),
    "fr": ("French", "Romance"), "he": ("Hebrew", "Semitic"), "hi": ("Hindi", "Indo-Aryan"),
    "id": ("Indonesian", "Austronesian"), "it": ("Italian", "Romance"), "ja": ("Japanese", "Japonic"),
    "ko": ("Korean", "Koreanic"), "nl": ("Dutch", "Germanic"), "pl": ("Polish", "Slavic"),
    "pt": ("Portuguese", "Romance"), "ro": ("Romanian", "Romance"), "ru": ("Russian", "Slavic"),
    "tr": ("Turkish", "Turkic"), "uk": ("Ukrainian", "Slavic"), "vi": ("Vietnamese", "Austroasiatic"),
    "zh": ("Chinese (simplified)", "Sinitic"), "zh-Hant": ("Chinese (traditional)", "Sinitic")}

# One teacher is trained per cluster of related languages; every cluster shares English, Spanish and French, as in Aya
# Expanse. The paper's exact clusters are not published: these keep families and scripts together and are ours.
SHARED = ["en", "es", "fr"]
CLUSTERS = {"western": ["de", "nl", "it", "pt", "ro"] + SHARED, "eastern": ["cs", "pl", "ru", "uk", "el"] + SHARED,
            "mideast": ["ar", "he", "fa", "tr", "hi"] + SHARED,
            "asian": ["zh", "zh-Hant", "ja", "ko", "vi", "id"] + SHARED}

# Unicode scripts that a text in the language is written in, as unicodedata.name() begins; the others: Latin
SCRIPTS = {"ar": ("ARABIC",), "fa": ("ARABIC",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "el": ("GREEK",),
           "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "ko": ("HANGUL", "CJK"), "zh": ("CJK",), "zh-Hant": ("CJK",),
           "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA")}

# ISO 639-3 (and the older 639-2/B) codes, which FLORES, NLLB and M-RewardBench use: arb_Arab, zho_Hant
THREE_LETTERS = {code: ours for ours, codes in {
    "ar": "arb ara", "cs": "ces cze", "de": "deu ger", "el": "ell gre", "en": "eng", "es": "spa", "fa": "pes fas per",
    "fr": "fra fre", "he": "heb", "hi": "hin", "id": "ind", "it": "ita", "ja": "jpn", "ko": "kor", "nl": "nld dut",
    "pl": "pol", "pt": "por", "ro": "ron rum", "ru": "rus", "tr": "tur", "uk": "ukr", "vi": "vie", "zh": "zho chi cmn"
    }.items() for code in codes.split()}


def code_of(name):
    """Other people's code or English name of a language -> ours, or None: arb_Arab, deu, pt-BR, zh_TW, zho_Hant, Greek."""
    first, *rest = str(name).replace("_", "-").casefold().split("-")
    first = THREE_LETTERS.get(first, first)
    if first == "zh" and {"hant", "tw", "hk", "mo"} & set(rest):
        return "zh-Hant"
    names = {english.casefold(): code for code, (english, _) in LANGUAGES.items()}
    return first if first in LANGUAGES else names.get(str(name).casefold())
