"""
Text in, token ids out: a checkpoint's tokenizer and its own chat template.

A conversation is rendered by the template that the model was trained with (jinja2, in a sandbox) and tokenised as
transformers does it: nothing is added behind the template's back, and there is exactly one BOS where the model has one.
What is trained of a conversation is exactly the assistant's text and the token that ends its turn.
"""

import datetime
import json
import os
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from checkpoint import find, read_json
from common import atomic_file, die

# ---------------------------------------------------------------------------------------------------------------------
# the miniature's own tokenizer: Aya's names and template, a vocabulary trained here

SPECIAL = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>",
           "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
           "<|SYSTEM_TOKEN|>"]  # the first eight also have Aya's ids

# A word keeps its combining marks (\p{M}: Hindi, Arabic; \u200c joins Persian), a digit is always a token of its own.
WORD_PATTERN = r" ?[\p{L}\p{M}\u200c]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m['role'] == 'user' %}<|USER_TOKEN|>{{ m['content'].strip() }}"
    "{% elif m['role'] == 'assistant' %}<|CHATBOT_TOKEN|>{{ m['content'].strip() }}"
    "{% else %}<|SYSTEM_TOKEN|>{{ m['content'] }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}")  # what Aya Expanse renders


def train_tokenizer(texts, vocab_size, folder):
    """Byte-level BPE over an iterable of strings, written as tokenizer.json and tokenizer_config.json into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    with atomic_file(Path(folder) / "tokenizer.json") as f:
        f.write(tokenizer.to_str(pretty=False))
    with atomic_file(Path(folder) / "tokenizer_config.json") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<BOS_TOKEN>", "pad_token": "<PAD>",
                   "eos_token": "<|END_OF_TURN_TOKEN|>", "clean_up_tokenization_spaces": False,
                   "chat_template": CHAT_TEMPLATE}, f, indent=2)


# ---------------------------------------------------------------------------------------------------------------------
# templates

MARK = re.compile("\ue000(\\d+)\ue001")  # stands for a text that is tokenised apart


def compile_template(text, where):
    """A chat template as transformers runs it: sandboxed jinja2 with its extra names. -> jinja2 Template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what an assistant said; it renders as its inside."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def today(form):  # makes a rendering depend on the day: SOURCE_DATE_EPOCH, as build tools have it, fixes it
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        day = datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc) if epoch else datetime.datetime.now()
        return day.strftime(form)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    env.globals |= {"raise_exception": refuse, "strftime_now": today}
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        die(f"{where}: line {e.lineno} of the chat template is wrong: {e.message}")


def read_template(folder, config):
    """The template's text and the file it is from: chat_template.jinja, else tokenizer_config.json; (None, None)."""
    if (path := folder / "chat_template.jinja").exists():
        try:
            return path.read_text(encoding="utf-8"), path
        except (OSError, ValueError) as e:
            die(f"{path} cannot be read ({e}); copy it again")
    path, found = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(found, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
    return (found, path) if isinstance(found, str) else (None, None)


class Chat:
    """
    The tokenizer and chat template of a checkpoint folder or hub name.

    bos, pad, eos: ids (bos may be None; eos ends a document); end: the id that ends an assistant's turn; stop_ids: all
    that end a generation; control: ids of special tokens and of those that the template writes around turns, whether
    they are marked special or not (Aya's are not); vocab_size: ids from here on have no text and must not be sampled.
    """

    def __init__(self, folder):
        self.folder = find(folder)
        path = self.folder / "tokenizer.json"
        if not path.exists():
            die(f"{path} not found: a checkpoint folder carries its tokenizer")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises plain Exception for all that is wrong with the file
            die(f"{path} is damaged or of a kind that tokenizers does not know ({str(e).splitlines()[0]}); copy it again")
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        config = {} if not (p := self.folder / "tokenizer_config.json").exists() else read_json(p)
        names = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()
                 if key.endswith("_token") and isinstance(value, (str, dict))}
        added = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.names, (text, self.where) = names, read_template(self.folder, config)
        self.template = compile_template(text, self.where) if text is not None else None
        self._cache = {}  # prompts and completions repeat: K samples, several epochs, several scorers

        # 1) one BOS: the one the template writes, or the one the tokenizer would put before a text
        own = self.tokenizer.encode("", add_special_tokens=True).ids
        self.bos = self._id(names.get("bos_token"))
        self.adds_bos = self.bos is not None and own[:1] == [self.bos]

        # 2) which tokens are not text: special ones, and the added ones that a conversation is framed with
        self.control = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        self.control |= {self._id(name) for name in names.values()} - {None}
        turn, rendered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], ""
        for messages in ([{"role": "system", "content": "s"}, *turn, turn[0]], [*turn, turn[0]]):  # some have no system
            rendered = rendered or (self._render(messages, True, refused="") if self.template else "")
        if lost := [t for t in re.findall(r"<\|\w+\|>", rendered) if self._id(t) is None]:
            die(f"{self.where}: the chat template writes {lost[0]}, which {path} does not know: they are of two models")
        self.control |= {i for i, content in added.items() if content in rendered}
        self.spelled = re.compile("|".join(sorted((re.escape(added[i]) for i in self.control if i in added),
                                                  key=len, reverse=True)) or r"(?!)")

        # 3) what ends a turn: what the model's files say, and the token that the template writes behind an answer
        self.stop_ids = {self._id(names.get("eos_token"))} - {None}
        for file in ("generation_config.json", "config.json"):
            ids = read_json(p).get("eos_token_id") if (p := self.folder / file).exists() else None
            self.stop_ids |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)
                              and not isinstance(i, bool) and 0 <= i < self.vocab_size}
        if self.template:
            tail = self._tail("b")
            behind = [i for i in tail if i in self.control]
            self.end = next((i for i in behind if i in self.stop_ids), behind[0] if behind else None)
            if self.end is None:
                die(f"{self.where}: the chat template writes no special token behind an answer, so no answer would end")
            self.stop_ids.add(self.end)
        else:
            self.end = self._id(names.get("eos_token"))
        document_end = self._id("<EOS_TOKEN>")  # Aya's files: eos_token is the end of a turn, this one of a document
        self.eos = document_end if document_end is not None else self._id(names.get("eos_token"))
        pad = self._id(names.get("pad_token"))
        self.pad = next((i for i in (pad, self.eos, self.end) if i is not None), 0)

    def _id(self, token):
        return self.tokenizer.token_to_id(token) if token else None

    # --- rendering

    def _render(self, messages, add_generation_prompt, refused=None):
        """The conversation as text. `refused`: what to return if the template refuses it; None: end with one line."""
        if self.template is None:
            die(f"{self.folder} has no chat template (in tokenizer_config.json or chat_template.jinja): it is a base "
                'model; train it on {"text"} rows, or give it a chat_template.jinja')
        import jinja2
        try:
            return self.template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None,
                                        documents=None, **self.names)
        except jinja2.TemplateError as e:  # its own refusals, undefined names, and what the sandbox forbids
            if refused is not None:
                return refused
            shown = json.dumps(messages, ensure_ascii=False)
            reason = " ".join(str(e).split()) or type(e).__name__
            die(f"{self.where}: the chat template refuses a conversation ({reason}): {shown[:80]}")
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as e:
            die(f"{self.where}: the chat template fails ({type(e).__name__}: {e})")

    def _ids(self, messages, add_generation_prompt):
        """Ids of a rendered conversation, with one BOS."""
        guarded, texts = self._guard(messages)
        return self._text_ids([self._render(guarded, add_generation_prompt)], texts)

    def _text_ids(self, pieces, texts):
        """Pieces of a rendering, each tokenised apart, with one BOS."""
        ids = []
        for piece in pieces:
            for n, part in enumerate(MARK.split(piece) if texts else [piece]):
                ids += self._part_ids(n, part, texts, first=not ids)
        return [self.bos, *ids] if self.adds_bos and ids[:1] != [self.bos] else ids

    def _guard(self, messages):
        """
        A text that spells out a control token must not become one. Such texts (rare) are put aside and leave a mark in
        private-use characters, so that the template's own words and theirs are tokenised apart. -> (messages, texts)
        """
        guarded, texts = [], []
        for m in messages:
            if not self.control.isdisjoint(self._plain(m["content"], True)) or MARK.search(m["content"]):
                core = m["content"].strip()
                texts.append(core)
                m = m | {"content": m["content"].replace(core, f"\ue000{len(texts) - 1}\ue001", 1)}
            guarded.append(m)
        return guarded, texts

    def _part_ids(self, n, part, texts, first=False):
        """Of a rendering split by MARK, part n: the template's own words, or at odd n the number of a text."""
        return self._apart(texts[int(part)], first) if n % 2 else self._plain(part, first)

    def _plain(self, text, first):
        """Ids of a text; where it is not the first one, without the space that SentencePiece puts in front."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if not first and text:
            for mark in "\n|0.a":
                line = self.tokenizer.encode(mark, add_special_tokens=False).ids
                behind = self.tokenizer.encode(mark + text, add_special_tokens=False).ids
                if behind[:len(line)] == line and line != ids[:len(line)]:
                    return behind[len(line):]
        return ids

    def _apart(self, text, first=True):
        """Ids without a control token: cut in the middle of each."""
        found = self.tokenizer.encode(text, add_special_tokens=False)
        cuts = [sum(span) // 2 for i, span in zip(found.ids, found.offsets) if i in self.control]
        if not cuts:
            return self._plain(text, first)
        return [i for a, b in zip([0, *cuts], [*cuts, None]) for i in self._apart(text[a:b], first and a == 0)]

    def messages(self, prompt):
        """A prompt is a string (one user turn) or a list of {"role", "content"} messages."""
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def _cut(self, ids):
        """Up to and with the first stop id: what a template writes behind it (a line break) is not the assistant's."""
        return next((ids[:n + 1] for n, i in enumerate(ids) if i in self.stop_ids), ids)

    def _tail(self, completion):
        """
        Ids of what the template writes from the answer on. It is looked up behind a prompt of one letter: what ends a
        turn does not depend on the question, and so a completion is tokenised once for all uses.
        """
        user = [{"role": "user", "content": "a"}]
        both = [*user, {"role": "assistant", "content": completion}]
        head, whole = self.prompt_ids("a"), self._ids(both, False)
        if whole[:len(head)] == head:
            return whole[len(head):]
        # the answer's first letters join the header's last ones into one token: take the text apart instead, since
        # generation starts from the header alone
        guarded, texts = self._guard(both)
        a, b = self._render(user, True), self._render(guarded, False)
        if not b.startswith(a):
            die(f"{self.where}: the chat template writes other words before an answer than before a generation")
        parts = MARK.split(b[len(a):]) if texts else [b[len(a):]]
        return [i for n, part in enumerate(parts) for i in self._part_ids(n, part, texts)]

    # --- what the scripts use

    def encode(self, text):
        """Ids of plain text. Control tokens spelled out in the text stay text: users cannot forge a turn."""
        key = "text", text
        if key not in self._cache:
            self._cache[key] = self._apart(text)
        return list(self._cache[key])

    def prompt_ids(self, prompt):
        """One BOS, the turns so far, and the header of the assistant's turn: what generation starts from."""
        key = ("prompt", prompt) if isinstance(prompt, str) else ("messages", json.dumps(prompt, sort_keys=True))
        if key not in self._cache:
            self._cache[key] = self._ids(self.messages(prompt), True)
        return list(self._cache[key])

    def completion_ids(self, completion):
        """The trained part: the text as the template writes it, and the token that ends the turn."""
        key = "completion", completion
        if key not in self._cache:
            self._cache[key] = self._cut(self._tail(completion))
        return list(self._cache[key])

    def conversation_ids(self, prompt, completion):
        """The whole conversation as the template writes it: what a reward model reads."""
        return self._ids([*self.messages(prompt), {"role": "assistant", "content": completion}], False)

    def messages_ids(self, messages):
        """A conversation of several answers -> ids, and a mask that is True on each answer and its end of turn."""
        guarded, texts = self._guard(messages)
        text, ids, heads, cuts = self._render(guarded, False), self._ids(messages, False), [], [0]
        for n, m in enumerate(messages):
            if m["role"] == "assistant":
                head = self._render(guarded[:n], True)
                if not text.startswith(head):
                    die(f"{self.where}: the chat template writes turn {n + 1} of a conversation differently once it "
                        "has gone on, so what was said cannot be told from what was asked; give rows with prompt and "
                        "completion")
                heads.append(len(head))
                begin = self._text_ids([head], texts)
                if ids[:len(begin)] != begin:
                    cuts.append(len(head))
        # where an answer's first letters would join its header's last ones into one token, they are tokenised apart,
        # since generation starts from the header alone
        def cut(end):
            return self._text_ids([text[a:min(b, end)] for a, b in zip(cuts, [*cuts[1:], end]) if a < end], texts)

        ids = cut(len(text))
        mask = [False] * len(ids)
        for head in heads:
            start = len(cut(head))
            answer = self._cut(ids[start:])
            mask[start:start + len(answer)] = [True] * len(answer)
        last = max((i for i, trained in enumerate(mask) if trained), default=-1)
        if messages[-1]["role"] == "assistant":
            ids, mask = ids[:last + 1], mask[:last + 1]
        return ids, mask

    def decode(self, ids):
        """Text of generated ids up to the end of the turn; role tokens never reach the reader."""
        ids = next((ids[:n] for n, i in enumerate(ids) if i in self.stop_ids), ids)
        return self.tokenizer.decode([i for i in ids if i not in self.control], skip_special_tokens=False)
