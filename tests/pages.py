"""What the tests of a page share: a parser that complains about bad nesting, and a prompt in every language."""

from html.parser import HTMLParser

ROWS = {  # language: prompt, right completion, a near miss
    "ar": ("اكتب العدد 146 بالحروف.", "مائة وستة وأربعون", "مائة وستة"),
    "cs": ("Napiš číslo 623 slovy.", "šest set dvacet tři", "šest set třináct"),
    "de": ("Schreibe die Zahl 872 in Worten.", "achthundertzweiundsiebzig", "zweihundertachtundsiebzig"),
    "el": ("Γράψε τον αριθμό 410 ολογράφως.", "τετρακόσια δέκα", "τετρακόσια είκοσι"),
    "en": ("Write the number 836 in words.", "eight hundred thirty-six", "eight hundred"),
    "es": ("Escribe el número 298 con palabras.", "doscientos noventa y ocho", "ochocientos noventa y dos"),
    "fa": ("عدد 423 را به حروف بنویس.", "چهارصد و بیست و سه", "چهارصد و بیست و"),
    "fr": ("Écris le nombre 979 en toutes lettres.", "neuf cent soixante-dix-neuf", "neuf cent soixante-dix-huit"),
    "he": ("כתוב את המספר 717 במילים.", "שבע מאות ושבע עשרה", "שבע מאות ושבע"),
    "hi": ("संख्या 251 को शब्दों में लिखिए।", "दो सौ इक्यावन", "एक सौ बावन"),
    "id": ("Tulis angka 915 dengan huruf.", "sembilan ratus lima belas", "sembilan ratus lima"),
    "it": ("Scrivi il numero 379 in lettere.", "trecentosettantanove", "trecentottantanove"),
    "ja": ("328を漢数字で書いてください。", "三百二十八", "三百三十八"),
    "ko": ("다음 숫자를 한글로 쓰세요: 287", "이백팔십칠", "이백구십칠"),
    "nl": ("Schrijf het getal 38 in woorden.", "achtendertig", "achtentwintig"),
    "pl": ("Zapisz liczbę 762 słownie.", "siedemset sześćdziesiąt dwa", "siedemset sześćdziesiąt"),
    "pt": ("Escreva o número 852 por extenso.", "oitocentos e cinquenta e dois", "novecentos e cinquenta e dois"),
    "ro": ("Scrie numărul 366 în litere.", "trei sute șaizeci și șase", "patru sute șaizeci și șase"),
    "ru": ("Напиши число 52 словами.", "пятьдесят два", "сорок два"),
    "tr": ("837 sayısını yazıyla yaz.", "sekiz yüz otuz yedi", "sekiz yüz otuz sekiz"),
    "uk": ("Напиши число 423 словами.", "чотириста двадцять три", "чотириста двадцять два"),
    "vi": ("Viết số 423 bằng chữ.", "bốn trăm hai mươi ba", "bốn trăm hai mươi hai"),
    "zh": ("请用中文数字写出27。", "二十七", "七十二"),
    "zh-Hant": ("請用中文數字寫出99。", "九十九", "八十九"),
}

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Every element as (tag, attributes, path of open tags), every text with its path; complains about bad nesting."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))

    def text(self, *tags):
        """All text, or the text somewhere inside one of `tags`."""
        return "\n".join(t for t, path in self.texts if "style" not in path and (not tags or set(tags) & set(path)))

    def find(self, tag, **wanted):
        """Attributes of all elements <tag> whose attributes are as wanted (class_ is class)."""
        return [a for t, a, _ in self.elements
                if t == tag and all(a.get(k.rstrip("_")) == v for k, v in wanted.items())]
