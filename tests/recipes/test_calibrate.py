from recipes.calibrate import nested, search
from stream.tracks.settings import TracksSettings


def test_the_search_finds_what_only_two_moves_together_reach():
    """The error has a valley that no single move enters."""

    def cost(tracks, least):
        onset, offset = tracks.turns.onset, tracks.turns.offset
        if (onset, offset) == (0.9, 0.55):
            return 1.0
        return 10.0 + abs(onset - 0.6) + abs(offset - 0.2)

    start = TracksSettings().over({"turns": {"onset": 0.6, "offset": 0.2}})
    candidates = {"turns.onset": [0.6, 0.7, 0.9], "turns.offset": [0.2, 0.4, 0.55]}
    found = search(start, candidates, cost, trials=200, seed=1)
    assert (found.turns.onset, found.turns.offset) == (0.9, 0.55)
    again = search(start, candidates, cost, trials=200, seed=1)
    assert again == found


def test_a_pair_that_contradicts_itself_is_passed_over():
    start = TracksSettings().over({"turns": {"onset": 0.5, "offset": 0.4}})
    found = search(start, {"turns.offset": [0.9]}, lambda *_: 0.0, trials=5, seed=1)
    assert found == start


def test_a_dotted_key_is_nested():
    assert nested("a.b.c", 1) == {"a": {"b": {"c": 1}}}
