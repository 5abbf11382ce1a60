import pytest
import torch

from recipes.teachers import Segmentation


@pytest.fixture
def segmentation(tmp_path):
    """The teacher with weights of the right shapes, made up."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(60, 128, 4, bidirectional=True, batch_first=True)
    state = {f"lstm.{name}": value for name, value in lstm.state_dict().items()}
    for name, shape in (
        ("sincnet.conv1d.1", (60, 80, 5)),
        ("sincnet.conv1d.2", (60, 60, 5)),
        ("linear.0", (128, 256)),
        ("linear.1", (128, 128)),
        ("classifier", (7, 128)),
    ):
        state[f"{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        state[f"{name}.bias"] = torch.zeros(shape[0])
    sizes = {"wav_norm1d": 1, "norm1d.0": 80, "norm1d.1": 60, "norm1d.2": 60}
    for name, size in sizes.items():
        state[f"sincnet.{name}.weight"] = torch.ones(size)
        state[f"sincnet.{name}.bias"] = torch.zeros(size)
    bank = "sincnet.conv1d.0.filterbank."
    edges = torch.linspace(30, 7600, 41)
    state[bank + "low_hz_"] = edges[:-1, None]
    state[bank + "band_hz_"] = edges.diff()[:, None]
    state[bank + "window_"] = torch.hamming_window(251, periodic=False)[:125]
    state[bank + "n_"] = 2 * torch.pi * torch.arange(-125.0, 0)[None] / 16_000
    path = tmp_path / "segmentation.pt"
    torch.save({"state_dict": state}, path)
    return Segmentation(path)


def test_its_filters_are_of_their_bands(segmentation):
    spectrum = torch.fft.rfft(segmentation.filters[:, 0], 4096).abs()
    peaks = spectrum.argmax(1) * 16_000 / 4096
    low = 50 + torch.linspace(30, 7600, 41)[:-1]
    high = torch.clamp(low + 50 + (7600 - 30) / 40, max=8000)
    for quadrature in (peaks[:40], peaks[40:]):
        assert (quadrature > low - 80).all()
        assert (quadrature < high + 80).all()


def test_it_speaks_on_the_student_s_frames(segmentation):
    wave = 0.1 * torch.randn(2, 5 * 16_000)
    heard = segmentation.activity(wave, 249)
    assert heard.shape == (2, 249, 3)
    assert heard.min() >= 0
    assert heard.max() <= 1
    known = segmentation.logits(wave).softmax(-1) @ segmentation.members
    # frame 100 is centred on sample 32,360, the teacher's 118th on 32,355
    torch.testing.assert_close(heard[:, 100], known[:, 118], atol=0.02, rtol=0.0)
