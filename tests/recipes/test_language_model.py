import gzip
from pathlib import Path

import kenlm
import numpy as np
import pytest

from recipes.language_model import BEGIN, SPECIAL, arpa, count, discounts, estimate, write
from recipes.recognition import beam, greedy, word_scores
from recipes.settings import load
from recipes.student import VOCABULARY
from stream.tracks.language import LanguageModel
from stream.tracks.settings import TracksSettings

ROOT = Path(__file__).parents[2]
EMBEDDED = ROOT / "model/weights/ctc/language_model.arpa.gz"


def text(lines=60, seed=0):
    """Sentences of a tiny grammar, some words in them once."""
    rng = np.random.default_rng(seed)
    people, verbs, things = ["ANN", "BEN", "CAT"], ["SEES", "HEARS"], ["DOGS", "BIRDS", "TREES"]
    return [
        [
            str(rng.choice(people)),
            str(rng.choice(verbs)),
            *(["THE"] if rng.random() < 0.5 else []),
            str(rng.choice(things)) if rng.random() < 0.9 else f"THING{number}",
        ]
        for number in range(lines)
    ]


def trained(folder, cutoffs=(0, 0, 0), sentences=None):
    words, tables = count(sentences or text(), 3)
    path = folder / "some.arpa"
    write(arpa(estimate(words, tables, cutoffs), 7), path)
    return words, kenlm.Model(str(path))


@pytest.mark.parametrize("cutoffs", [(0, 0, 0), (0, 0, 1), (0, 2, 2)])
def test_every_distribution_sums_to_one(tmp_path, cutoffs):
    words, model = trained(tmp_path, cutoffs)
    said = [word for word in words if word != SPECIAL[BEGIN]]
    histories = [[], ["ANN"], ["ANN", "SEES"], ["SEES", "THE"], ["THING", "X"], ["DOGS", "ANN"]]
    for begins in (True, False):
        for history in histories:
            state, after = kenlm.State(), kenlm.State()
            (model.BeginSentenceWrite if begins else model.NullContextWrite)(state)
            for word in history:
                model.BaseScore(state, word, after)
                state, after = after, state
            total = sum(10 ** model.BaseScore(state, word, after) for word in said)
            assert total == pytest.approx(1, abs=1e-4), (begins, history)


def test_frequent_n_grams_have_nearly_their_share(tmp_path):
    sentences = [["A", "B"]] * 70 + [["A", "C"]] * 30
    _, model = trained(tmp_path, sentences=sentences)
    after_a = {word: 10 ** model.score(f"A {word}", eos=False) for word in ("B", "C", "A")}
    assert after_a["B"] == pytest.approx(0.7, abs=0.03)
    assert after_a["C"] == pytest.approx(0.3, abs=0.03)
    assert after_a["A"] < 0.01


def test_unseen_words_have_the_share_of_words_seen_once(tmp_path):
    sentences = text(400)
    words, model = trained(tmp_path, sentences=sentences)
    flat = [word for sentence in sentences for word in sentence]
    once = sum(flat.count(word) == 1 for word in set(flat)) / len(flat)
    state = kenlm.State()
    model.NullContextWrite(state)
    assert 10 ** model.BaseScore(state, "NEVER", kenlm.State()) == pytest.approx(once, rel=1e-3)
    assert "NEVER" not in words


def test_counts_do_not_cross_sentences():
    words, tables = count([["A", "B"], ["B", "A"]], 3)
    assert words == [*SPECIAL, "A", "B"]
    pairs = {
        (words[tables[0].word[prefix]], words[word])
        for prefix, word in zip(tables[1].prefix, tables[1].word, strict=True)
    }
    assert pairs == {
        ("<s>", "A"),
        ("A", "B"),
        ("B", "</s>"),
        ("<s>", "B"),
        ("B", "A"),
        ("A", "</s>"),
    }
    assert len(tables[2].word) == 4


def test_discounts_are_those_of_chen_and_goodman():
    counts = np.array([1] * 40 + [2] * 20 + [3] * 10 + [4] * 5)
    assert discounts(counts) == pytest.approx([0, 0.5, 2 - 3 * 0.5 * 0.5, 3 - 4 * 0.5 * 0.5])
    assert discounts(np.array([1, 1, 5])) == pytest.approx([0, 0.5, 1, 1.5])


def test_cutoffs_leave_rare_n_grams_out_and_the_bytes_are_the_same_every_time(tmp_path):
    words, tables = count(text(), 3)
    whole = arpa(estimate(words, tables, (0, 0, 0)), 3)
    cut = arpa(estimate(words, tables, (0, 1, 1)), 3)
    assert f"ngram 2={len(tables[1].word)}" in whole
    assert f"ngram 2={(tables[1].count > 1).sum()}" in cut
    assert f"ngram 1={len(words)}" in cut
    sizes = [write(cut, tmp_path / name) for name in ("one.arpa.gz", "two.arpa.gz")]
    one, two = ((tmp_path / name).read_bytes() for name in ("one.arpa.gz", "two.arpa.gz"))
    assert one == two
    assert sizes == [len(one)] * 2
    assert gzip.decompress(one).decode() == cut


def test_the_settings_of_the_embedded_model_can_be_read():
    from recipes.language_model import LanguageModel as Recipe

    settings = load(Recipe, ROOT / "recipes/language_model.yaml")
    assert len(settings.cutoffs) == settings.order
    assert EMBEDDED.samefile(ROOT / settings.target)


def guess(sentence, rng):
    """A sentence as a weak acoustic model hears it: log-probabilities [T, V]."""
    rows = [np.eye(32)[0] * 12] * 10
    for character in sentence.replace(" ", "|"):
        row = rng.normal(0, 1.6, 32)
        row[1:4] = -9
        row[0] = 1
        row[VOCABULARY.index(character)] += 4.5
        rows += [row] * int(rng.integers(1, 3)) + [np.eye(32)[0] * 8] * int(rng.integers(1, 4))
    table = np.array([*rows, *[np.eye(32)[0] * 12] * 10])
    return (table - np.log(np.exp(table).sum(1, keepdims=True))).astype(np.float32)


SENTENCES = (
    "I THOUGHT IT WOULD BE BETTER TO WAIT UNTIL THE MORNING",
    "SHE WENT TO THE WINDOW AND LOOKED OUT INTO THE STREET",
    "WE HAVE BEEN WALKING ALL DAY AND THE CHILDREN ARE TIRED",
    "HE SAID THAT HE HAD NEVER SEEN SUCH A BEAUTIFUL HOUSE",
    "THERE WAS NOTHING MORE TO BE DONE ABOUT IT",
    "THE OLD MAN SHOOK HIS HEAD AND SAT DOWN BY THE FIRE",
)


def test_the_embedded_model_is_small_and_halves_the_errors_of_a_weak_ear():
    assert EMBEDDED.stat().st_size < 5_000_000
    language = LanguageModel.load(EMBEDDED)
    assert language.order == 3
    rng = np.random.default_rng(0)
    heard = [(sentence, guess(sentence, rng)) for sentence in SENTENCES]
    search = beam(TracksSettings(), language)
    plain = word_scores((meant, greedy(scores)) for meant, scores in heard)
    found = word_scores((meant, search(scores)) for meant, scores in heard)
    assert 20 < plain["cer"] < 45
    assert found["cer"] < plain["cer"] / 2
    assert found["wer"] < plain["wer"] / 2
