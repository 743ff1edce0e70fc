"""
guards.py, in both directions: what each guard must flag and must not, in many scripts; how often it errs; its time.

    python -m pytest tests/test_guards.py

The last tests break the guards one by one and see the cases fail. bench/langid.py measures them on more text.
"""

import json
import math
import re
import statistics
import time
import unicodedata

import pytest

import guards
from guards import distinct_n, flags
from languages import LANGUAGES
from mini.items import load_udhr
from mini.langid import LanguageModel, plain

ARTICLE = {r["language"]: r["text"].split("\n", 1)[1] for r in load_udhr([26])}  # without its heading


def judge(language, text, prompt="?", **more):
    return flags({"prompt": prompt, "completion": text, "language": language} | more)


# --- what passes ---

PASSES = [
    # short, or without words
    ("en", "42"), ("fr", "Paris"), ("ja", "OK"), ("hi", "👍🎉"), ("ar", "3.14159"), ("el", "—"),
    ("es", "Albert Einstein"), ("fr", "The Lord of the Rings"), ("it", "Universally Unique Identifier"),
    ("ja", "東京都千代田区"),
    # code and addresses
    ("ru", "```python\nprint('hello world, this is some text in English that nobody has to read')\n```"),
    ("ru", "```python\nprint('hello world, this is some text in English that was cut off before"),
    ("zh", "https://example.com/some/long/english/path/that/goes/on/and/on"),
    ("he", "`git commit --amend --no-edit --author 'somebody else who writes English'`"),
    ("hi", "<div class=\"container\"><p class=\"a very long name\">नमस्ते</p></div>"),
    # technical terms and names in Latin letters
    ("hi", "पाइथन में for loop लिखने के लिए range() function का उपयोग करें। Visual Studio Code install करना न भूलें।"),
    ("ja", "Windows 11でVisual Studio Codeをインストールする方法を説明します。"),
    ("ko", "아이폰에서 Wi-Fi 설정을 열고 Bluetooth를 끄세요. Google Chrome 브라우저도 업데이트하세요."),
    ("zh", "你可以使用 PyTorch 和 TensorFlow 来训练深度学习模型，例如 ResNet 或 BERT。"),
    ("zh", "你可以使用 Visual Studio Code 和 Machine Learning Toolkit 来训练模型，"
           "并且安装 Universal Windows Platform 应用程序。"),
    ("fa", "می‌توانید از نرم‌افزار Photoshop برای ویرایش تصویرها استفاده کنید. این کار آسان است و زمان زیادی نمی‌برد."),
    ("de", "Der Film heißt im Original „The Lord of the Rings: The Fellowship of the Ring“ und ist lang."),
    # quoted foreign words, mathematics
    ("en", "The Russian word for “hello” is «здравствуйте», and in Greek one says (γειά σου)."),
    ("en", "Let α, β and γ be the angles of a triangle; then α + β + γ = π, for every triangle in the plane."),
    # marks, forms and letters of their own
    ("uk", "Обʼєднані Нації проголосили, що всі люди народжуються вільними й рівними у своїй гідності та правах."),
    ("ar", "السَّلامُ عَلَيْكُمْ وَرَحْمَةُ اللهِ وَبَرَكاتُهُ، أَهْلًا وَسَهْلًا بِكُمْ في مَدينَتِنا الجَميلَة"),
    ("ar", "مرحبـــــــــــــا بكم فـــي الموقـــــع الجديد للشركة"),
    ("he", "בְּרֵאשִׁית בָּרָא אֱלֹהִים אֵת הַשָּׁמַיִם וְאֵת הָאָרֶץ וְהָאָרֶץ הָיְתָה תֹהוּ וָבֹהוּ"),
    ("vi", unicodedata.normalize("NFD", "Thủ đô của Việt Nam là Hà Nội, một thành phố rất lâu đời và đẹp.")),
    ("tr", "İstanbul'da ılık bir İLKBAHAR günüydü; IŞIK her yerdeydi ve insanlar sokaklarda geziniyordu."),
    ("ja", "ＡＢＣ順に並べてください。ﾊﾝｶｸｶﾅも使えます。ｳｨﾝﾄﾞｳを開いて、もう一度試してください。"),
    ("en", "Ｆｕｌｌ　ｗｉｄｔｈ　ｌｅｔｔｅｒｓ　ａｒｅ　ｓｔｉｌｌ　ｌｅｔｔｅｒｓ　ｏｆ　Ｅｎｇｌｉｓｈ"),
    # close relatives
    ("zh-Hant", "臺灣的首都是臺北，這是一個非常現代化的城市，有許多夜市和美食。"),
    ("zh", "中国的首都是北京，这是一座历史悠久的城市，有许多名胜古迹。"),
    ("pt", "O rato roeu a roupa do rei de Roma e a rainha, com raiva, resolveu remendar."),
    ("es", "El perro de San Roque no tiene rabo porque Ramón Rodríguez se lo ha cortado."),
    ("cs", "Příliš žluťoučký kůň úpěl ďábelské ódy, a proto ho nikdo neposlouchal."),
    ("pl", "W Szczebrzeszynie chrząszcz brzmi w trzcinie i Szczebrzeszyn z tego słynie."),
    ("id", "Ibu pergi ke pasar untuk membeli sayur dan buah, lalu memasak makan siang."),
    # what repeats lawfully
    ("en", "hahahahahaha that is so funny hahahahaha"), ("zh", "哈哈哈哈哈哈哈哈，太好笑了！"),
    ("en", "A number with many zeros: 1" + 120 * "0"), ("en", "Title\n" + 100 * "-" + "\nThe text begins here."),
    ("en", "| a | b |\n|---|---|\n" + "| Yes | Yes |\n" * 12), ("en", "```\n" + "            }\n" * 12 + "```"),
    ("en", "for x in y:\n" + "".join(f"        print({i})\n" for i in range(9))),
    ("en", "\n".join(f"{i} x 7 = {7 * i}" for i in range(1, 30))),
    ("en", "\n".join(f"- Item {i}: {w}" for i, w in enumerate("apples pears plums grapes figs dates limes".split()))),
    ("en", "\n".join(f"{i}. See `f{i}` at https://a.b/c{i}" for i in range(1, 30))),
    ("en", 2 * "We all live in a yellow submarine,\nyellow submarine, yellow submarine.\n\nAnd our friends are all "
           "aboard,\nmany more of them live next door,\nand the band begins to play.\n\n"),
    ("en", "\n".join(f"- https://docs.example.com/en/stable/reference/of/the/functions.html#{w}" for w in dir(str))),
    ("en", "Name:" + " " * 450 + "the value"), ("en", "```html\n" + "      </div>\n" * 9 + "```"),
    ("en", "Ring the bells that still can ring,\n" * 3 + "forget your perfect offering."),
    ("en", "Let it be, let it be, let it be, let it be,\nwhisper words of wisdom, let it be"),
    ("en", "Na na na na na na na na na na na na, hey Jude"), ("ja", "にわにはにわにわとりがいる。すもももももももものうち。"),
    # a template's tokens, talked about
    ("en", "Use `<|im_start|>` to begin a turn.\n```\n<|im_start|>user\n[INST] hi [/INST]\n```"),
    ("en", "In F#, x |> f pipes a value; you can also write f <| x |> g, or a <| b."),
    ("en", "Was <s>20 €</s>, now 15 €"),
    ("en", "Instructions:\n1. Mix.\n2. Bake.\n\nUser: name of the user\nResponse: the answer"),
    ("en", "## Response\nThe body responds to heat."), ("en", "Alice: Hi!\n\nHuman: who are you?\n\nAlice: a cat."),
]

# --- what does not ---

FAILS = [
    ("language", "fr", "The capital of France is Paris, and it has been so for many centuries now."),
    ("language", "es", "A capital de Portugal é Lisboa, uma cidade muito antiga, cheia de história e de gente."),
    ("language", "pt", "La capital de España es Madrid, una ciudad muy antigua, donde viven muchas personas."),
    ("language", "uk", "Столица России — Москва, очень старый город с богатой историей и большим числом жителей."),
    ("language", "ru", "Столиця України — Київ, дуже старе місто з багатою історією та великою кількістю мешканців."),
    ("language", "fa", "عاصمة مصر هي القاهرة، وهي مدينة قديمة جدا ولها تاريخ طويل ويسكنها ملايين من الناس."),
    ("language", "ar", "پایتخت ایران تهران است که شهری بسیار بزرگ است و میلیون‌ها نفر در آن زندگی می‌کنند."),
    ("language", "zh", "臺灣的首都是臺北，這是一個非常現代化的城市，有許多夜市和美食，每年吸引許多遊客。"),
    ("language", "zh-Hant", "中国的首都是北京，这是一座历史悠久的城市，有许多名胜古迹，每年吸引很多游客。"),
    ("language", "zh", "日本の首都は東京です。とても大きな都市で、多くの人々が住んでいます。"),
    ("language", "ja", "中国的首都是北京，这是一座历史悠久的城市，有许多名胜古迹，每年吸引很多游客。"),
    ("language", "cs", "Stolicą Polski jest Warszawa, duże miasto nad Wisłą, w którym mieszka dwa miliony ludzi."),
    ("language", "de", "```\nx = 1\n```\nThis code sets the variable to one, and that is all that it does."),
    ("language", "fr", "“The capital of France is Paris,” he said. “It has been so for many centuries now.”"),
    ("language", "hi", "The capital of India is New Delhi, which is a very large city in the north of the country."),
    ("script", "ar", "The capital of Egypt is Cairo, which is a very large city on the river Nile."),
    ("script", "pl", "Stolicą Polski jest Warszawa, duże miasto над рекой Висла, w którym mieszka wielu ludzi."),
    ("script", "en", "You can find it in the 图书馆附近的商店里面 near the river, every day."),
    ("script", "ko", "한국의 수도는 서울이며 это очень большой город 입니다."),
    ("script", "zh", "日本の首都は東京です。とても大きな都市で、多くの人々が住んでいます。"),
    ("script", "tr", "ประเทศไทยมีเมืองหลวงคือกรุงเทพมหานครซึ่งเป็นเมืองใหญ่มาก"),
    ("repeated", "en", "The answer is" + " the" * 20), ("repeated", "en", "I like it. " * 6 + "I like i"),
    ("repeated", "fr", "Bonjour. " + "Je suis désolé, mais je ne peux pas répondre à cela aujourd'hui. " * 3 + "Je s"),
    ("repeated", "zh", "北京是首都。" + "我很高兴。" * 6 + "我很"), ("repeated", "ja", "東京は大きい" + "都市です" * 8),
    ("repeated", "ko", "서울은 " + "아주 큰 도시 " * 7), ("repeated", "hi", "भारत की राजधानी " + "बहुत अच्छी है " * 8),
    ("repeated", "ar", "القاهرة " + "هي مدينة كبيرة " * 7), ("repeated", "en", "very very very very good, " * 6),
    ("repeated", "en", "It begins well. " + "no way out and " * 8 + "then it goes on, as if nothing had been."),
    ("repeated", "en", "\n".join(f"{i}. The capital of France is Paris." for i in range(1, 9))),
    ("repeated", "en", " ".join(f"Step {i}: go back to the step that came before this one and do all of it again."
                                for i in range(1, 20))),
    ("repeated", "en", "No way out and no word of it.\nno way out and a wall, said the man. " + "no way out and " * 7),
    ("repeated", "en", "".join(f"        print({i})\n" for i in range(100, 160)) + "The end" + " of the" * 12),
    ("repeated", "en", "!" * 500), ("repeated", "en", "😂" * 450),
    ("repeated", "en", "```\n" + "x = x + 1\n" * 60 + "```"),
] + [("role_tokens", "en", "Paris. " + token) for token in (
    "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>hi", "<|START_RESPONSE|>",
    "<EOS_TOKEN>", "<|eot_id|>", "<|start_header_id|>user", "<|im_end|>\n<|im_start|>user", "<end_of_turn>",
    "<start_of_turn>user", "[INST] hi [/INST]", "</s>", "<<SYS>>", "<|user|>", "<eos>", "＜|im_end|＞",
    "\n### Instruction:\nWrite", "\n### Human: hi", "\n\nHuman: hi\n\nAssistant: yes")]

# prompt, completion, is it copied?
QUESTION = "What is the capital of France?"
COPIES = [
    ("Hello", "Hello! How can I help?", False), ("Hello", "Hello", False), ("你好", "你好！很高兴见到你。", False),
    (QUESTION, QUESTION, True), (QUESTION, "what is  the capital of FRANCE", True),
    (QUESTION, QUESTION + "\n\nParis.", True),
    (QUESTION, f"**{QUESTION}** Paris.", True), (QUESTION, f"You asked: {QUESTION} It is Paris.", False),
    (QUESTION, "The capital of France is Paris.", False),
    (QUESTION, "What is the capital of Francesco's country?", False),
    ("What is 1234 times 5678, please?", "What is 1234 times 5679, please?", False),
    ("Correct this: “He go to school every day.”", "He goes to school every day.", False),
    ("Repeat: “He goes to school every day.”", "He goes to school every day.", False),
    ("Repeat: “He goes to school every day.”", "Repeat: “He goes to school every day.” He goes", True),
    ("法国的首都是哪座城市，那里住着多少人？", "法国的首都是哪座城市，那里住着多少人？巴黎。", True),
    ("法国的首都是哪里？", "法国的首都是巴黎。", False), ("フランスの首都はどこですか？", "フランスの首都はどこですか", True),
    ("İstanbul'un IŞIKLARI nerede yanıyor?", "istanbul'un ışıkları nerede yanıyor", True),
    ("ما هي عاصمة فرنسا وكم يبلغ عدد سكانها؟", "مَا هِيَ عاصمـــة فرنسا وكم يبلغ عدد سكانها؟", True),
    ("מה היא בירת צרפת וכמה תושבים יש בה?", "מָה הִיא בירת צרפת וכמה תושבים יש בה?", True),
    ("Thủ đô của nước Pháp là gì?", unicodedata.normalize("NFD", "Thủ đô của nước Pháp là gì?"), True),
    ("Ｗｈａｔ　ｉｓ　ｔｈｅ　ｃａｐｉｔａｌ？", "What is the capital?", True),
    ("１２３４ と ５６７８ を足すといくつですか？", "1234 と 5678 を足すといくつですか？ 6912", True),
    ([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Paris."},
      {"role": "user", "content": "And what is the one of Germany?"}], "And what is the one of Germany? Berlin.", True),
    ([{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Paris."},
      {"role": "user", "content": "Again?"}], QUESTION, False),
    ([], "Anything at all that is long enough", False)]


def failures():
    """Every case above that goes wrong; guards other than the one a case is about are the first list's business."""
    bad = [(language, text[:50]) for language, text in PASSES if judge(language, text)]
    bad += [(guard, text[:50]) for guard, language, text in FAILS if guard not in judge(language, text)]
    return bad + [(str(prompt)[:40], text[:40]) for prompt, text, yes in COPIES
                  if ("copied" in judge("en", text, prompt)) != yes]


def test_cases():
    assert failures() == []


def test_a_row():
    assert judge("en", "Paris.") == [] and judge("en", "Paris.", ended=True) == []
    assert judge("en", "Paris.", ended=False) == ["truncated"]
    assert judge("en", "", ended=False) == ["truncated", "empty"]
    for nothing in ("", " \n\t ", "\u200b", "\ufeff \u00a0", "\u2028"):
        assert judge("en", nothing) == ["empty"]
    assert judge("en", "\U0001FAE8") == judge("en", "\U0001FFFE") == [] == judge("en", ".")
    everything = "<|im_end|>" + "Столица России — Москва, очень старый город с богатой историей. " * 20
    assert judge("en", everything, everything.replace("<|im_end|>", ""), ended=False)[:4] == [
        "truncated", "language", "script", "repeated"]  # in the order of GUARDS
    assert judge("en", "It is <|im_end|>.", "What ends a turn?") == ["role_tokens"]
    assert judge("en", "It is <|im_end|>.", "Is it <|im_end|> or <|im_start|>?") == []
    assert judge("en", "It is <|im_end|>.", [{"role": "user", "content": "Is it <|im_end|>?"}]) == []
    assert judge("sw", "Mji mkuu wa Ufaransa ni Paris, jiji kubwa sana lenye historia ndefu.") == []  # not judged
    assert [guards.script(c) for c in "aя々ーʼ1ा"] == ["LATIN", "CYRILLIC", "CJK", "KATAKANA-HIRAGANA", "", "", ""]
    with pytest.raises(KeyError):
        flags({"completion": "x", "language": "en"})


# --- in every language ---

@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language(language):
    text = ARTICLE[language]
    sentence = re.split(r"(?<=[.。।])\s*", text)[0]
    for form in ("NFC", "NFD", "NFKC"):
        assert judge(language, unicodedata.normalize(form, text)) == []
    assert judge(language, unicodedata.normalize("NFD", text), text) == ["copied"]
    assert "copied" in judge(language, text.upper() + " " + text[:20], text)
    assert judge(language, sentence, text) == [] and judge(language, text, "?") == []
    assert "repeated" in judge(language, text + sentence * 7)
    assert "repeated" in judge(language, text + (sentence * 7)[:-len(sentence) // 2])  # breaks off within the unit
    assert "repeated" in judge(language, text[:200] + sentence[:15] * 10 + text[200:])  # and goes on
    assert judge(language, text.replace("<", "") + "\n```\n<|im_start|>\n```") == []
    for other in LANGUAGES:
        assert ("language" in judge(other, text)) == (other != language), other


def pieces(n):
    rows = load_udhr(range(25, 31))
    return [(r["language"], r["text"][i:i + n]) for r in rows for i in range(0, len(r["text"]), 2 * n)]


def test_rates():
    """Measured on the pieces of bench/langid.py: no false flag; wrong languages found: 99.4 % from 30 letters on."""
    closest = {"ar": "fa", "fa": "ar", "cs": "pl", "pl": "cs", "es": "pt", "pt": "es", "ru": "uk", "uk": "ru",
               "de": "nl", "nl": "de", "zh": "zh-Hant", "zh-Hant": "zh",
               "ja": "zh", "it": "es", "ro": "it", "id": "en", "en": "fr"}
    for n, least in ((50, 0.95), (100, 0.98)):
        false, found = [], []
        for language, text in pieces(n):
            false.append(bool(judge(language, text)))
            words = guards.prose(text)
            if language in closest and guards.letters(words).total() >= guards.ENOUGH:
                found.append(guards.wrong_language(words, closest[language]))
        assert statistics.fmean(false) <= 0.002 and statistics.fmean(found) >= least, n
    assert not [text for language, text in pieces(20) if judge(language, text)]


# --- time ---

HARD = {"a": "a", "two": "ab", "backticks": "`", "open code": "`a", "fences": "```", "parentheses": "(a", "quotes": "“",
        "guillemets": "«a", "stars": "*", "tags": "<a", "tokens": "<|a", "dollars": "$$a",
        "lines": "\n", "roles": "### \n",
        "humans": "\n\nHuman: a", "table": "|a\n", "list": "1. ", "dots": "a.", "surrogates": "\ud800a",
        "marks": "e" + "\u0301\u0327" * 9999, "ligatures": "ﷺ", "han": "".join(map(chr, range(0x4E00, 0x9FA0)))}


@pytest.mark.parametrize("unit", HARD.values(), ids=HARD)
def test_time_is_linear(unit):
    """Measured: 0.2 s for 100,000 characters, 1.5 s where each becomes 18; anything quadratic takes minutes."""
    text = (unit * (100_000 // len(unit) + 1))[:100_000]
    LanguageModel.shipped()
    begin = time.perf_counter()
    judge("en", text, text)
    assert time.perf_counter() - begin < 10


def test_loops_are_found_by_distances_not_by_trying_every_period():
    """A period far beyond any short list of candidates; the only regular thing in the text."""
    unit = "".join(json.dumps(i * i * 7919) for i in range(700))  # 4,000 characters without a loop of their own
    assert not guards.loops(unit, (60, 0)) and guards.loops("x" + unit * 3, (60, 0))
    assert not guards.loops(unit * 2, (60, 0)) and not guards.loops("", (60, 0)) and not guards.loops("aaa", (60, 0))


# --- distinct_n ---

def test_distinct_n():
    assert distinct_n([]) == distinct_n(["", "Paris"]) == 0.0  # no pair at all
    assert distinct_n(["a b c"]) == 1 and distinct_n(["a b", "a b"]) == 0.5 and distinct_n(["a b c", "a b d"]) == 0.75
    assert distinct_n(["a a a a"], 1) == 0.25 and distinct_n(["a b", "b a"], 1) == 0.5 and distinct_n(["a b c"], 3) == 1
    assert distinct_n(["ab ab"]) == 1.0  # a pair of words, not of characters, and none across two texts
    assert distinct_n(["北京北京"]) == pytest.approx(2 / 3) and distinct_n(["北京 北京"]) == pytest.approx(2 / 3)
    assert distinct_n(["서울은 큰 도시", "서울은 큰 나라"]) == 0.75  # Korean has spaces


# --- mini/langid.py; more in tests/test_eval.py ---

def test_plain():
    assert plain("  Crème  BRÛLÉE, 1234! ") == plain(unicodedata.normalize("NFD", "crème brûlée 5")) == "crème brûlée 0"
    assert plain("İSTANBUL") == "istanbul" and plain("مرحبـــا") == "مرحبا" and plain("שָׁלוֹם") == "שלום"
    assert plain("کتاب‌ها") == "کتاب‌ها" and plain("हिन्दी में") == "हिन्दी में"
    assert plain("Ａｂ１２") == "ab0" and plain("...") == ""


def test_witten_bell():
    """By hand: "ab" is a, b and the end after it; of three characters seen once each half the mass is for others."""
    model, unseen = LanguageModel([("en", "ab")]), math.exp(-8.3)
    one = (1 + 3 * unseen) / 6  # P(a) = P(b) = P(end), before any context
    two = (1 + one) / 2  # P(a | start), P(b | a), P(end | b)
    three = (1 + two) / 2  # P(b | start a), P(end | a b)
    four = (1 + three) / 2  # P(end | start a b)
    assert model.scores("ab")["en"] == pytest.approx(math.log(two * three * four), rel=1e-5)
    assert model.scores("b")["en"] == pytest.approx(math.log(one / 2 * two), rel=1e-5)  # never first: backs off
    assert model.scores("AB ab!")["en"] == pytest.approx(2 * math.log(two * three * four), rel=1e-5)
    assert model.scores("ж")["en"] < model.scores("c")["en"] < model.scores("b")["en"] < 0 == model.scores("?!")["en"]
    two_registers = LanguageModel([("en", "ab")], [("en", "cd")])
    assert two_registers.scores("ab")["en"] > two_registers.scores("ad")["en"]
    with_prose = LanguageModel([("en", "ab"), ("de", "cd")], [("en", "x")])
    assert with_prose.identify("ab") == with_prose.identify("x") == "en" and with_prose.identify("cd") == "de"


def test_encodings_know_characters_that_were_not_read():
    model = LanguageModel.shipped()
    read = {char for r in load_udhr(range(25)) if r["language"].startswith("zh") for char in r["text"]}
    for simplified, traditional in ("盐鹽", "龙龍", "鸟鳥"):
        assert not {simplified, traditional} & read
        assert model.scores(simplified)["zh"] > model.scores(simplified)["zh-Hant"] + 3
        assert model.scores(traditional)["zh"] + 3 < model.scores(traditional)["zh-Hant"]


# --- the cases can fail ---

BROKEN = {
    "short texts are judged": {"ENOUGH": 5}, "long ones are not": {"ENOUGH": 150}, "never sure": {"SURE": 1e9},
    "sure too soon": {"SURE": -1, "SURE_PER_LETTER": 0}, "sure too late": {"SURE_PER_LETTER": 1},
    "own script: all": {"OWN": 0.95}, "own script: none": {"OWN": 0.0}, "foreign: any": {"FOREIGN": -1, "OWN": 0.0},
    "foreign: none": {"FOREIGN": 1}, "characters are all alike": {"WEIGHT": {}}, "reads nothing": {"READ": 2},
    "short loops": {"LOOP": 20}, "loops: twice": {"TIMES": 2, "TIMES_LONG": 2}, "loops: long": {"LOOP": 200},
    "loops: many": {"TIMES": 9}, "sentences: many": {"TIMES_LONG": 5}, "rules are loops": {"LONG_LOOP": 60},
    "rules are none": {"LONG_LOOP": 10**6}, "again: never": {"AGAIN": 1.1}, "again: at once": {"AGAIN": 0.01},
    "code is prose": {"NO_PROSE": re.compile(r"(?!)")}, "code is talk": {"VERBATIM": re.compile(r"(?!)")},
    "blocks loop": {"BLOCK": re.compile(r"(?!)")}, "quotations count": {"QUOTED": re.compile(r"(?!)")},
    "links loop": {"LINK": re.compile(r"(?!)")},
    "tables loop": {"TABLE": re.compile(r"(?!)")}, "lists count": {"NUMBERED": re.compile(r"(?!)")},
    "no tokens": {"ROLE_TOKENS": re.compile(r"(?!)")}, "tokens: any <|": {"ROLE_TOKENS": re.compile(r"<\|")},
    "struck out": {"STRUCK": re.compile(r"(?!)")}, "no normal form": {"normal": lambda text: text},
    "case counts": {"plain": lambda text: text}, "digits are alike": {"re": type("re", (), {
        "findall": staticmethod(lambda *a: []), "sub": staticmethod(re.sub)})},
    "nothing is empty": {"empty": lambda text: False}, "no language": {"wrong_language": lambda *a: False},
    "no script": {"wrong_script": lambda *a: False}, "no loops": {"repeated": lambda text: False},
    "no copies": {"copied": lambda *a: False}, "marks are letters": {"script": lambda c: "LATIN" if c > " " else ""}}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_broken_guards_fail(change, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(guards, name, value)
    try:
        test_a_row()
    except AssertionError:
        return
    assert failures()
