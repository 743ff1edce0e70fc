"""
What a model says to many prompts at once, for tasks that let it write: as a chat, or going on with a text as it stands.
"""

from common import die, gather_list, rank, world
from generate import Stop, complete, generate
from sharding import unsharded


def longest_first(rows, make):
    """make(rows in the order of falling prompt lengths) -> its results in the order of `rows`: what is long starts early."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["prompt"]))
    made = dict(zip(order, make([rows[i] for i in order]), strict=True))
    return [made[i] for i in range(len(rows))]


def reply(model, chat, rows, max_new_tokens):
    """Rows with id, language and prompt -> greedy completion rows in the same order, through the model's chat template."""
    return longest_first(rows, lambda rows: complete(model, chat, rows, max_new_tokens))


def text_ids(chat, text, room):
    """
    Ids of a text as lm-evaluation-harness encodes it: with what the tokenizer itself puts in front, and no second BOS; of a
    text longer than `room` tokens, the last ones.
    """
    bos = chat.names.get("bos_token")
    ids = chat.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos))).ids
    return ids[-room:]


def go_on(model, chat, rows, max_new_tokens, stop):
    """
    Rows with a prompt -> [{"completion", "ended"}] in the same order: how the model goes on with the text, greedily, up to
    the first of the strings `stop(row)`. Rows are split over the ranks; those with the same strings are sampled together.
    """
    room = model.cfg.max_position_embeddings - max_new_tokens
    if room <= 0:
        die(f"the model reads {model.cfg.max_position_embeddings} tokens: no room for {max_new_tokens} new ones")

    def share(rows):
        mine, done = range(rank(), len(rows), world()), []
        with unsharded(model):
            for strings in dict.fromkeys(tuple(stop(rows[i])) for i in mine):
                at, end = [i for i in mine if tuple(stop(rows[i])) == strings], Stop(chat.stop_ids, strings, chat.decode)
                made = generate(model, [text_ids(chat, rows[i]["prompt"], room) for i in at], max_new_tokens,
                                vocab_size=chat.vocab_size, stop=end)
                for i, (ids,) in zip(at, made):
                    text, stopped = end.cut(chat.decode(ids))
                    done.append((i, {"completion": text, "ended": stopped or ids[-1] in end.ids}))
        return [row for _, row in sorted(gather_list(done), key=lambda part: part[0])]

    return longest_first(rows, share)
