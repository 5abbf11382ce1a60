import json

import pytest
import torch

from model.encoder import UniSpeechSatModel
from model.heads import (
    UniSpeechSatForAudioFrameClassification,
    UniSpeechSatForCTC,
    UniSpeechSatForXVector,
)
from model.state import Window
from recipes.export import load_student, write_checkpoints
from recipes.finetune import Finetune, Rows, Run
from recipes.loop import resume, save
from recipes.settings import load
from recipes.student import Shape, Student

TINY = Shape(
    layers=2,
    width=32,
    heads=2,
    feed_forward=64,
    positions=8,
    position_groups=4,
    conv_dim=(16, 32),
    conv_kernel=(320, 3),
    tdnn=(32, 512),
)


@pytest.fixture(scope="module")
def settings(data, tmp_path_factory):
    return Finetune(
        data=data,
        campplus=None,
        run=tmp_path_factory.mktemp("run"),
        steps=60,
        decay_steps=20,
        warm_up_steps=5,
        rate=1e-2,
        utterance_hops=[180],
        talk_hops=[250],
        utterance_batch_hops=360,
        talk_batch_hops=250,
        sources={"tones": 0.8, "nameless": 0.2},
        nobody=0.1,
        windows=[(10, 5)],
        left=[50],
        stream_from=2,
        bfloat16=False,
        shape=TINY,
        conversation={"sources": {"tones": 0.8, "nameless": 0.2}},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {"bells": 1.0}}, r"^sources: got 'bells', but .* has nameless, tones"),
        ({"phases": {9: {"conversation.sources": {"bells": 1.0}}}}, r"^conversation\.sources: got"),
    ],
)
def test_a_corpus_that_was_not_prepared_is_named(settings, changes, message):
    with pytest.raises(SystemExit, match=message):
        Run(settings.model_copy(update=changes))


def test_a_folder_that_was_not_prepared_is_named(settings, tmp_path):
    with pytest.raises(SystemExit, match=r"nothing: no prepared data; python -m recipes\.prepare"):
        Run(settings.model_copy(update={"data": tmp_path / "nothing"}))


class Repeating:
    """An activity teacher who says what each hop's first sample holds, the speakers turned round.

    The samples hold who talks in binary digits. Each time the order is another.
    """

    def __init__(self):
        self.heard = []

    def activity(self, wave, frames):
        self.heard.append(wave.shape[1])
        said = wave[:, ::320][:, :frames].long()
        talking = torch.stack([said & 1, said & 2, said & 4], -1) > 0
        return talking.float().roll(len(self.heard), -1)


def test_the_activity_teacher_hears_long_scenes_in_pieces(settings):
    run = Run(settings.model_copy(update={"soft": 1.0}))
    run.segmentation = teacher = Repeating()
    exact = torch.rand(2, 1198, 3) < 0.4
    wave = torch.zeros(2, 1200 * 320)
    wave[:, : 1198 * 320 : 320] = (exact * torch.tensor([1, 2, 4])).sum(-1).float()
    batch, _ = run.feed(0)[0]
    batch.wave, batch.activity = wave, exact
    torch.testing.assert_close(run.activity(batch), exact.float())
    assert len(teacher.heard) == 3
    assert max(teacher.heard) <= 160_000


def test_losses_fall(settings):
    run = Run(settings)
    steps = [run.advance() for _ in range(30)]
    for name in ("u.ctc", "u.mel", "u.activity", "c.mel", "c.activity"):
        first = sum(step[name] for step in steps[:5])
        last = sum(step[name] for step in steps[-5:])
        assert last < 0.9 * first, (name, first, last)


def test_a_run_that_was_cut_makes_the_same_steps(settings, tmp_path):
    run = Run(settings)
    for _ in range(3):
        run.advance()
    save(run, tmp_path)
    expected = [run.advance() for _ in range(2)]
    again = Run(settings)
    assert resume(again, tmp_path)
    assert again.step == 3
    assert [again.advance() for _ in range(2)] == expected
    for name, parameter in again.student.named_parameters():
        assert torch.equal(parameter, dict(run.student.named_parameters())[name]), name
        assert torch.equal(again.average[name], run.average[name]), name


def test_scenes_made_ahead_by_another_process_are_the_same(settings):
    alone = Run(settings.model_copy(update={"workers": 0}))
    helped = Run(settings.model_copy(update={"workers": 1}))
    try:
        for step in range(2):
            for (one, seen), (other, also) in zip(alone.feed(step), helped.feed(step), strict=True):
                assert torch.equal(one.wave, other.wave)
                assert torch.equal(one.rows, other.rows)
                assert seen == also
    finally:
        helped.feed.close()


def test_settings_change_where_a_phase_begins(settings):
    phases = {5: {"weights.ctc": 2.0}, 9: {"weights.ctc": 3.0, "acoustics.clean": 0.5}}
    changing = settings.model_copy(update={"phases": phases})
    assert changing.at(4) == changing
    assert changing.at(5).weights.ctc == 2
    assert changing.at(20).weights.ctc == 3
    assert changing.at(20).acoustics.clean == 0.5
    assert changing.at(8).acoustics.clean == 0


def test_the_rate_rises_stays_and_falls(settings):
    run = Run(settings)
    assert run.rate(0) == pytest.approx(settings.rate / 5)
    assert run.rate(20) == settings.rate
    assert run.rate(50) == pytest.approx(settings.rate / 2)
    assert run.rate(60) == 0


def test_a_run_may_start_from_the_weights_of_another(settings, tmp_path):
    first = Run(settings)
    for _ in range(3):
        first.advance()
    save(first, tmp_path)
    more = {"start": tmp_path / "checkpoint.pt", "first_step": 60, "steps": 90}
    run = Run(settings.model_copy(update=more))
    for name, parameter in run.student.named_parameters():
        assert torch.equal(parameter, first.average[name]), name
    assert run.step == 60
    assert run.rate(60) == pytest.approx(settings.rate / 5)
    assert run.rate(80) == pytest.approx(settings.rate / 2)
    run.advance()
    assert run.step == 61


def test_exported_checkpoints_are_the_student(tmp_path):
    torch.manual_seed(0)
    student = Student(TINY).eval()
    write_checkpoints(student, TINY, tmp_path)
    wave = 0.1 * torch.randn(1, 16_000)
    window = Window(chunk=10, left=20, right=4)
    heads = {
        "diarization": UniSpeechSatForAudioFrameClassification,
        "speaker": UniSpeechSatForXVector,
        "ctc": UniSpeechSatForCTC,
    }
    with torch.inference_mode():
        out = load_student(tmp_path)(wave, window)
        expected = {"diarization": out.activity, "speaker": out.voice, "ctc": out.characters}
        for name, kind in heads.items():
            model = kind.from_pretrained(tmp_path / name).eval()
            assert isinstance(model.unispeech_sat, UniSpeechSatModel)
            encoded = model.unispeech_sat(wave, output_hidden_states=True, streaming=window)
            assert torch.allclose(model.of(encoded), expected[name], atol=1e-5)
        whole = student(wave, window)
        assert torch.allclose(whole.activity, out.activity, atol=1e-2)  # float16 weights
    index = json.loads((tmp_path / "ctc" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["lm_head.weight"] == "head.safetensors"
    places = set(index["weight_map"].values())
    assert places == {"head.safetensors", "../encoder.safetensors"}


def test_pooling_weighs_frames(data):
    torch.manual_seed(0)
    student = Student(TINY).eval()
    voice = torch.rand(1, 40, 512)
    mass = torch.zeros(1, 40)
    mass[:, 10:30] = 1
    chosen = voice[:, 10:30]
    pooled = torch.cat([chosen.mean(1), chosen.std(1)], 1)
    expected = student.speaker.feature_extractor(pooled)
    assert torch.allclose(student.embed(voice, mass), expected, atol=1e-4)


def test_settings_take_changes_and_refuse_unknown_keys(tmp_path):
    path = tmp_path / "shape.yaml"
    path.write_text("layers: 3\n")
    assert load(Shape, path, ["width=64"]).width == 64
    with pytest.raises(ValueError, match="depth"):
        load(Shape, path, ["depth=4"])
    with pytest.raises(ValueError, match="expected key=value, got 'layers'"):
        load(Shape, path, ["layers"])


def test_a_run_whose_device_mixes_learns_and_makes_the_same_steps_again(settings, tmp_path):
    changed = settings.model_copy(update={"mix": True, "dropout": 0.1, "masked": 0.2})
    run = Run(changed)
    steps = [run.advance() for _ in range(25)]
    for name in ("u.ctc", "u.activity", "c.activity", "c.mel"):
        first = sum(step[name] for step in steps[:5])
        last = sum(step[name] for step in steps[-5:])
        assert last < 0.95 * first, (name, first, last)
    save(run, tmp_path)
    expected = run.advance()
    again = Run(changed)
    assert resume(again, tmp_path)
    assert again.advance() == expected


def test_frames_are_masked_ten_at_a_time_and_counted(settings):
    run = Run(settings.model_copy(update={"masked": 0.2, "mix": True}))
    (batch, _), _ = run.feed(0)
    assert batch.wave.shape[1] == 0
    run.generator.manual_seed(0)
    hidden = torch.stack([run.masked(batch) for _ in range(50)])
    assert 0.1 < hidden.float().mean() < 0.25  # spans that meet count once
    starts = hidden[..., 1:] & ~hidden[..., :-1]
    spans = hidden.unfold(-1, 10, 1).all(-1)
    inner = starts[..., : spans.shape[-1] - 1]
    assert spans[..., 1:][inner].all()
    assert Run(settings).masked(batch) is None


def test_what_is_masked_is_not_seen(settings):
    torch.manual_seed(0)
    student = Student(settings.shape).eval()
    wave = 0.1 * torch.randn(1, 16_000)
    other = wave.clone()
    other[:, 4000:6000] = 0.1 * torch.randn(2000)
    masked = torch.zeros(1, 49, dtype=torch.bool)
    masked[:, 8:22] = True
    assert not torch.allclose(student(wave).hidden, student(other).hidden)
    student.drop(0.1)
    hidden = [student(each, masked=masked).hidden for each in (wave, other)]
    torch.testing.assert_close(*hidden)
    assert not torch.allclose(student.train()(wave).hidden, student(wave).hidden)


def test_rows_in_memory_are_those_on_disk(corpus):
    disk = Rows(corpus.voice, torch.device("cpu"))
    memory = Rows(corpus.voice, torch.device("cpu"))
    memory.memory = torch.from_numpy(corpus.voice[:].copy())
    at = torch.tensor([3, 0, 7])
    assert torch.equal(disk[at], memory[at])
    assert len(disk) == len(corpus.voice)
