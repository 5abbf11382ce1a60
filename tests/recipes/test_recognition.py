import numpy as np
import pytest

from recipes.recognition import greedy, word_scores
from recipes.student import VOCABULARY


def frames(symbols):
    """The best output of each frame, as log-probabilities."""
    rows = np.full((len(symbols), len(VOCABULARY)), np.log(1e-3), np.float32)
    for row, symbol in enumerate(symbols):
        rows[row, VOCABULARY.index("<pad>" if symbol == "_" else symbol)] = np.log(0.9)
    return rows


@pytest.mark.parametrize(
    ("symbols", "text"),
    [("__HEE_L_LLO||_AA_", "HELLO A"), ("____", ""), ("||A||", "A"), ("AAA_A", "AA")],
)
def test_greedy_text_leaves_repeats_and_blanks_out(symbols, text):
    assert greedy(frames(symbols)) == text


def test_symbols_of_the_tokenizer_are_no_text():
    rows = frames("A_B")
    rows[1] = np.log(1e-3)
    rows[1, VOCABULARY.index("<unk>")] = 0
    assert greedy(rows) == "AB"


def test_words_and_characters_are_counted_without_case_and_punctuation():
    found = word_scores([("GIVE IT UP", "Give it, up!"), ("A BC", "A BD")])
    assert found == {"cer": pytest.approx(100 / 14, abs=0.01), "wer": 20, "words": 5}
