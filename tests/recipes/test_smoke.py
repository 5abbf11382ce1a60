import json

import pytest

from recipes.smoke import falls, finite, main


@pytest.mark.slow
def test_every_stage_runs_from_the_files_of_the_last(capsys):
    main()
    said = capsys.readouterr().out
    for stage in (
        "prepare",
        "rooms",
        "pretrain",
        "finetune",
        "normalise",
        "export",
        "cohort",
        "calibrate",
        "score",
    ):
        assert f"{stage}: " in said


def test_a_loss_that_does_not_fall_is_said(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("\n".join(json.dumps({"loss": value}) for value in (1, 1, 2, 3)))
    with pytest.raises(SystemExit, match=r"run: loss went from 1\.0000 to 3\.0000"):
        falls(log, ["loss"])
    with pytest.raises(SystemExit, match=r"run: other is \[\], expected finite"):
        falls(log, ["other"])


def test_a_number_that_is_not_finite_is_said():
    assert finite({"a": [1, 2.5], "b": {"c": True, "d": "x"}}) == 2
    with pytest.raises(SystemExit, match=r"report\.a\.b: got nan"):
        finite({"a": {"b": float("nan")}})
