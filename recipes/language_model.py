"""The word trigram beside the CTC head: transcripts → ARPA, interpolated modified Kneser–Ney.

Stands apart from the numbered stages: it needs text alone. Estimation is that of Chen and Goodman
(1999, "An empirical study of smoothing techniques for language modeling"). ``<unk>`` has the
probability that Good and Turing give to all words the text does not have: the share of words in it
that are there once. Rare n-grams are cut after estimation, and backoff weights make every
distribution sum to one again. The file is read by KenLM as it is.
"""

import gzip
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recipes.settings import Settings, from_arguments

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

UNKNOWN, BEGIN, END = 0, 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")


class LanguageModel(Settings):
    """What is counted, and what is kept.

    Attributes:
        text: a sentence a line, words apart by white space; gzip where the name ends in ``.gz``.
        target: the ARPA file to write, gzip likewise.
        order: words of the longest n-gram.
        cutoffs: an n-gram of order ``k`` seen ``cutoffs[k - 1]`` times or less is left out.
        decimals: of the base-10 logarithms.
    """

    text: Path
    target: Path
    order: int = 3
    cutoffs: tuple[int, ...] = (0, 0, 1)
    decimals: int = 3


@dataclass(slots=True)
class Table:
    """All n-grams of one order, in a fixed order.

    Attributes:
        prefix: index of the n-gram without its last word among those one shorter.
        suffix: the same without its first word.
        word: last word.
        count: how often it was seen.
        begins: whether it begins a sentence.
    """

    prefix: Ints
    suffix: Ints
    word: Ints
    count: Ints
    begins: NDArray[np.bool_]


@dataclass(slots=True)
class Model:
    """A backoff model: for every order the n-grams, their probabilities and backoff weights."""

    words: Sequence[str]
    tables: list[Table]
    probability: list[Reals]
    backoff: list[Reals]
    kept: list[NDArray[np.bool_]]


def count(sentences: Iterable[Sequence[str]], order: int) -> tuple[list[str], list[Table]]:
    """Sentences → the vocabulary (special words first, then sorted) and the n-grams by order."""
    lines = [list(sentence) for sentence in sentences]
    words = [*SPECIAL, *sorted({word for line in lines for word in line})]
    index = {word: number for number, word in enumerate(words)}
    ids = [[BEGIN, *(index[word] for word in line), END] for line in lines]
    tokens = np.array([number for line in ids for number in line], np.int64)
    first = np.cumsum([0, *map(len, ids[:-1])])
    left = np.concatenate([np.arange(len(line), 0, -1) for line in ids])  # tokens to the end
    begins = np.zeros(len(tokens), bool)
    begins[first] = True
    size = len(words)
    tables = [
        Table(
            prefix=np.zeros(size, np.int64),
            suffix=np.zeros(size, np.int64),
            word=np.arange(size),
            count=np.bincount(tokens, minlength=size),
            begins=np.arange(size) == BEGIN,
        )
    ]
    at = tokens  # index of the n-gram that begins at each token
    for length in range(2, order + 1):
        where = np.flatnonzero(left >= length)
        keys = at[where] * size + tokens[where + length - 1]
        unique, example, inverse, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        tables.append(
            Table(
                prefix=unique // size,
                suffix=at[where[example] + 1],
                word=unique % size,
                count=counts,
                begins=begins[where[example]],
            )
        )
        at = np.full(len(tokens), -1)
        at[where] = inverse
    return words, tables


def discounts(counts: Ints) -> Reals:
    """What is taken off n-grams counted 0, 1, 2 and 3 or more times.  → [4]

    Chen and Goodman's closed form; half of each count where the counts of counts do not allow it,
    as in a text of a few lines.
    """
    n1, n2, n3, n4 = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n1 / (n1 + 2 * n2)
    closed = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(closed, 0, [0.0, 1.0, 2.0, 3.0])


def estimate(words: Sequence[str], tables: list[Table], cutoffs: Sequence[int]) -> Model:
    """Counts → probabilities of all n-grams; those seen too seldom are then marked as left out."""
    probability: list[Reals] = []
    for order, table in enumerate(tables, start=1):
        # Lower orders count in how many contexts a word is new, not how often it is said.
        counts = table.count
        if order < len(tables):
            wider = np.bincount(tables[order].suffix, minlength=len(counts))
            counts = np.where(table.begins, counts, wider)
        if order == 1:
            counts = np.where(np.isin(table.word, (UNKNOWN, BEGIN)), 0, counts)
        taken = discounts(counts)[np.minimum(counts, 3)]
        if order == 1:
            free = taken.sum() / counts.sum()
            once = (table.count[END + 1 :] == 1).sum() / table.count[END + 1 :].sum()
            unknown = min(free, once)
            said = counts > 0
            found = (counts - taken) / counts.sum() + said * (free - unknown) / said.sum()
            found[UNKNOWN] = unknown
        else:
            contexts = len(tables[order - 2].word)
            total = np.bincount(table.prefix, counts, contexts)
            free = np.bincount(table.prefix, taken, contexts)
            share = (free / np.maximum(total, 1))[table.prefix]
            found = (counts - taken) / total[table.prefix] + share * probability[-1][table.suffix]
        probability.append(found)
    kept = [
        (table.count > cutoff) | (order == 0)
        for order, (table, cutoff) in enumerate(zip(tables, cutoffs, strict=True))
    ]
    backoff: list[Reals] = []
    for order, table in enumerate(tables):
        if order + 1 == len(tables):
            backoff.append(np.ones(len(table.word)))
            continue
        above, keep = tables[order + 1], kept[order + 1]
        size = len(table.word)
        said = np.bincount(above.prefix[keep], probability[order + 1][keep], size)
        lower = np.bincount(above.prefix[keep], probability[order][above.suffix[keep]], size)
        backoff.append(np.maximum(1 - said, 1e-7) / np.maximum(1 - lower, 1e-7))
    return Model(words, tables, probability, backoff, kept)


def arpa(model: Model, decimals: int) -> str:
    """The model as an ARPA file."""
    spelled = [np.array(model.words, object)]
    for table in model.tables[1:]:
        spelled.append(spelled[-1][table.prefix] + " " + spelled[0][table.word])
    lines = ["\\data\\"]
    lines += [f"ngram {order}={keep.sum()}" for order, keep in enumerate(model.kept, start=1)]
    longest = len(model.tables)
    for order, (table, keep) in enumerate(zip(model.tables, model.kept, strict=True), start=1):
        with np.errstate(divide="ignore"):
            scores = np.log10(model.probability[order - 1][keep])
        scores = np.where(table.word[keep] == BEGIN, -99.0, np.maximum(scores, -99.0))
        weights = np.log10(model.backoff[order - 1][keep])
        lines += ["", f"\\{order}-grams:"]
        for score, text, weight in zip(scores, spelled[order - 1][keep], weights, strict=True):
            line = f"{score:.{decimals}f}\t{text}"
            if order < longest and abs(weight) >= 0.5 * 10**-decimals:
                line += f"\t{weight:.{decimals}f}"
            lines.append(line)
    return "\n".join([*lines, "", "\\end\\", ""])


def read_lines(path: Path) -> list[str]:
    """Lines of a text, gzip or not."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [line for line in text.splitlines() if line.strip()]


def write(text: str, path: Path) -> int:
    """Writes a text, gzip where the name says so, the same bytes every time; gives their number."""
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, 9, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return len(data)


def main() -> None:
    """Command line of the recipe."""
    settings = from_arguments(LanguageModel, "language_model", "count words, write an n-gram model")
    if len(settings.cutoffs) != settings.order:
        raise SystemExit(
            f"cutoffs: expected one for each of {settings.order} orders, got {settings.cutoffs}"
        )
    words, tables = count((line.split() for line in read_lines(settings.text)), settings.order)
    model = estimate(words, tables, settings.cutoffs)
    size = write(arpa(model, settings.decimals), settings.target)
    orders = " + ".join(str(keep.sum()) for keep in model.kept)
    print(f"{orders} n-grams, {size / 1e6:.2f} MB in {settings.target}")


if __name__ == "__main__":
    main()
