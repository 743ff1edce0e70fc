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
from array import array
from itertools import groupby
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

MARK = re.compile("\ue000(\\d+)\ue001")  # stands for a piece of text that is tokenised apart
CACHED = 2**24  # token ids that are remembered, 64 MB


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


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
    env.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    env.globals |= {"raise_exception": refuse, "strftime_now": today}
    try:
        return env.from_string(text)
    except jinja2.TemplateSyntaxError as e:
        die(f"{where}: line {e.lineno} of the chat template is wrong: {e.message}")
    except Exception as e:  # what Python says of the code that jinja2 made of it: nested too deep, too long a number
        die(f"{where}: the chat template cannot be compiled ({one_line(e)})")


def read_template(folder, config, other=None):
    """The template's text and the file it is from: chat_template.jinja, else tokenizer_config.json; (None, None)."""
    if (path := Path(other or folder / "chat_template.jinja")).exists() or other:
        try:
            return path.read_text(encoding="utf-8"), path
        except (OSError, ValueError) as e:
            die(f"{path} cannot be read ({e}); copy it again")
    path, found = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(found, list):  # [{"name": "default", "template": ...}, {"name": "tool_use", ...}]
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
    found = found.get("default") if isinstance(found, dict) else found
    return (found, path) if isinstance(found, str) else (None, None)


class Chat:
    """
    The tokenizer and chat template of a checkpoint folder or hub name.

    bos, pad, eos: ids (bos may be None; eos ends a document); end: the id that ends an assistant's turn; stop_ids: all
    that end a generation; control: ids of special tokens and of those that the template writes around turns, whether
    they are marked special or not (Aya's are not); vocab_size: ids from here on have no text and must not be sampled.
    """

    def __init__(self, folder, template=None):
        """`template`: a file with another chat template than the folder's."""
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
        config, more = ({} if not (p := self.folder / file).exists() else read_json(p)
                        for file in ("tokenizer_config.json", "special_tokens_map.json"))
        names = {key: value.get("content") if isinstance(value, dict) else value for key, value in (more | config).items()
                 if key.endswith("_token") and isinstance(value, (str, dict))}
        alone, framed, behind = (self.tokenizer.encode(text, add_special_tokens=special).ids for text, special in
                                 (("a", False), ("a", True), ("|a", False)))
        first = framed[0] if framed[0] != alone[0] else None  # what the tokenizer puts before a text
        if first is not None and "bos_token" not in names:  # some files leave it to a default of their class in transformers
            names["bos_token"] = self.tokenizer.id_to_token(first)
        tokens = self.tokenizer.get_added_tokens_decoder()
        added = {i: token.content for i, token in tokens.items()}
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.names, (text, self.where) = names, read_template(self.folder, config, template)
        self.template = compile_template(text, self.where) if text is not None else None
        self.spelled = re.compile("")  # every text that may hold a control token: it finds all of them
        self._cache, self._cached = {}, 0  # prompts and completions repeat: K samples, several epochs, several scorers
        self.asked, self.asked_head = self.messages("a"), None
        self.puts_space = behind[-len(alone):] != alone  # as SentencePiece does in front of a text

        # 1) one BOS: the one the template writes, or the one the tokenizer would put before a text
        self.bos = self._id(names.get("bos_token"))
        self.adds_bos = self.bos is not None and first == self.bos

        # 2) which tokens are not text: special ones, and the added ones that a conversation is framed with; but not line
        # breaks (which are added tokens in Gemma's files), nor what the template looks for in a text, as <think>
        self.control = {i for i, token in tokens.items() if token.special}
        self.control |= {self._id(name) for name in names.values()} - {None}
        turn, rendered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], ""
        for messages in ([{"role": "system", "content": "s"}, *turn, turn[0]], [*turn, turn[0]]):  # some have no system
            rendered = rendered or (self._render(messages, True, refused="") if self.template else "")
        if lost := [t for t in re.findall(r"<\|\w+\|>", rendered) if self._id(t) is None]:
            die(f"{self.where}: the chat template writes {lost[0]}, which {path} does not know: they are of two models")
        self.control |= {i for i, token in added.items() if token in rendered and token.strip() and not re.search(
            rf"""(['"]){re.escape(token)}\1\s*(not\s+)?in\b|split\(\s*['"]{re.escape(token)}""", text)}

        # 3) what ends a turn: what the model's files say, and the token that the template writes behind an answer
        self.stop_ids = {self._id(names.get("eos_token"))} - {None}
        for file in ("generation_config.json", "config.json"):
            ids = read_json(p).get("eos_token_id") if (p := self.folder / file).exists() else None
            self.stop_ids |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)
                              and not isinstance(i, bool) and 0 <= i < self.vocab_size}
        self.control |= self.stop_ids & added.keys()
        if all(i in tokens and not tokens[i].normalized for i in self.control):  # these are found by their letters alone
            self.spelled = re.compile("|".join(re.escape(added[i]) for i in self.control) + f"|{MARK.pattern}")
        if self.template:
            whole = self._render([turn[0], {"role": "assistant", "content": "\ue0000\ue001"}], False)
            behind = [i for i in self._plain(MARK.split(whole)[-1], False) if i in self.control]
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
        except Exception as e:  # a template is a program from elsewhere: it may fail in any way
            die(f"{self.where}: the chat template fails ({one_line(e)})")

    # --- tokenising

    def _plain(self, text, first):
        """Ids of a text; where it is not the first one, without the space that SentencePiece puts in front."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if self.puts_space and not first and text:
            for mark in "\n|0.a":
                line = self.tokenizer.encode(mark, add_special_tokens=False).ids
                behind = self.tokenizer.encode(mark + text, add_special_tokens=False).ids
                if behind[:len(line)] == line and line != ids[:len(line)]:
                    return behind[len(line):]
        return ids

    def _spelled(self, text):
        """Ids of a text that spells a control token, without that token: it is cut in the middle."""
        if self.control.isdisjoint(ids := self._plain(text, False)):
            return ids
        middle = len(text) // 2
        return self._spelled(text[:middle]) + self._spelled(text[middle:]) if middle else []

    def _guard(self, text, spans):
        """
        A text that spells out a control token must not become one. What spells it is put aside into `spans` and leaves a
        mark in private-use characters, which goes through the template and is tokenised apart. -> the text with marks
        """
        if not self.spelled.search(text):
            return text
        found, out, at = self.tokenizer.encode(text, add_special_tokens=False), "", 0
        for a, b in sorted([span for i, span in zip(found.ids, found.offsets) if i in self.control]
                           + [m.span() for m in MARK.finditer(text)]):
            if at <= a < b:
                out, at = f"{out}{text[at:a]}\ue000{len(spans)}\ue001", b
                spans.append(text[a:b])
        return out + text[at:]

    def _guarded(self, messages):
        """-> (messages with marks, spans)"""
        spans = []
        return [m | {"content": self._guard(m["content"], spans)} for m in messages], spans

    def _ids(self, text, spans, first=True, bos=True):
        """Ids of a rendering with marks, or of a piece of one that is not the first; with one BOS if it is."""
        ids = []
        for n, part in enumerate(MARK.split(text) if spans else [text]):  # at odd n, the number of a span
            ids += self._spelled(spans[int(part)]) if n % 2 else self._plain(part, first and not ids)
        return [self.bos, *ids] if first and bos and self.adds_bos and ids[:1] != [self.bos] else ids

    def _remember(self, key, make):
        """make(), a list of ids, or what it was the last time."""
        if key not in self._cache:
            if self._cached > CACHED:
                self._cache, self._cached = {}, 0
            self._cache[key] = array("i", make())
            self._cached += len(self._cache[key])
        return self._cache[key].tolist()

    def messages(self, prompt):
        """A prompt is a string (one user turn) or a list of {"role", "content"} messages."""
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    def _answer(self, text, spans):
        """
        Ids of an answer and the token that ends it, of a rendering from where generation starts. It is tokenised apart from
        its header, as it will be when it is generated: together, a line break at its start would join the header's.
        What a template writes behind the end (a line break, the next turn) is not the assistant's. -> (ids, rest of ids)
        """
        ids = self._ids(text, spans, first=False)
        end = next((n for n, i in enumerate(ids, 1) if i in self.stop_ids), None)
        texts = [control for control, _ in groupby(ids[:end], key=self.control.__contains__)].count(False)
        if end is None or texts > 1:  # a second text, framed by control tokens, is somebody else's
            die(f"{self.where}: the chat template ends an answer with no token that ends a generation "
                f"({self.tokenizer.decode(ids[:20], skip_special_tokens=False)!r}), so where it ends cannot be told")
        return ids[:end], ids[end:]

    def _head(self, guarded, text, n):
        """How much of a rendering is there when turn n is generated."""
        if guarded[:n] != self.asked:
            head = self._render(guarded[:n], True)
        else:  # the same one in front of every completion
            head = self.asked_head = self.asked_head or self._render(self.asked, True)
        if not text.startswith(head):
            die(f"{self.where}: the chat template writes turn {n + 1} of a conversation differently once it has gone on, so "
                "what was said cannot be told from what was asked; give rows with prompt and completion")
        return len(head)

    # --- what the scripts use

    def encode(self, text):
        """Ids of plain text. Control tokens spelled out in the text stay text: users cannot forge a turn."""
        def make():
            spans = []
            return self._ids(self._guard(text, spans), spans, bos=False)
        return self._remember(("text", text), make)

    def prompt_ids(self, prompt):
        """One BOS, the turns so far, and the header of the assistant's turn: what generation starts from."""
        def make():
            guarded, spans = self._guarded(self.messages(prompt))
            return self._ids(self._render(guarded, True), spans)
        return self._remember(("prompt", prompt) if isinstance(prompt, str) else
                              ("messages", json.dumps(prompt, sort_keys=True)), make)

    def completion_ids(self, completion):
        """
        The trained part: the text as the template writes it, and the token that ends the turn. It is looked up behind a
        prompt of one letter: what ends a turn does not depend on the question, so it is tokenised once for all uses.
        """
        def make():
            guarded, spans = self._guarded([*self.asked, {"role": "assistant", "content": completion}])
            text = self._render(guarded, False)
            return self._answer(text[self._head(guarded, text, 1):], spans)[0]
        return self._remember(("completion", completion), make)

    def conversation_ids(self, prompt, completion):
        """The whole conversation as the template writes it: what a reward model reads."""
        guarded, spans = self._guarded([*self.messages(prompt), {"role": "assistant", "content": completion}])
        return self._ids(self._render(guarded, False), spans)

    def messages_ids(self, messages):
        """A conversation of several answers -> ids, and a mask that is True on each answer and its end of turn."""
        guarded, spans = self._guarded(messages)
        text = self._render(guarded, False)
        heads = [self._head(guarded, text, n) for n, m in enumerate(messages) if m["role"] == "assistant"]
        ids, mask = self._ids(text[:heads[0]] if heads else text, spans), []
        for head, end in zip(heads, [*heads[1:], len(text)]):
            answer, rest = self._answer(text[head:end], spans)
            mask += [False] * (len(ids) - len(mask)) + [True] * len(answer)
            ids += answer + rest
        if messages[-1]["role"] == "assistant":  # what follows its end is not needed
            ids = ids[:len(mask)]
        return ids, mask + [False] * (len(ids) - len(mask))

    def decode(self, ids):
        """Text of generated ids up to the end of the turn; role tokens never reach the reader."""
        ids = next((ids[:n] for n, i in enumerate(ids) if i in self.stop_ids), ids)
        return self.tokenizer.decode([i for i in ids if i not in self.control], skip_special_tokens=False)
